"""Documents: links, anchors, paths and commands in them lead somewhere; tables that list something list all of it."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import ba_lora
from models import tiny_llama
from test_imports import LAYERS
from transformers import TrainingArguments

from balora_plugin import BaLoraTrainerMixin

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(page for tree in ("docs", "tests") for page in (ROOT / tree).rglob("*.md"))])
SOURCES = [path for tree in ("balora_plugin", "benchmarks", "studies") for path in (ROOT / tree).rglob("*.py")]
HISTORY = ROOT / "CHANGELOG.md"  # names what is gone
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for tree in ("balora_plugin", "benchmarks", "docs", "example_configs", "integration", "studies", "tests")
    for path in (ROOT / tree).rglob("*.py")
)
_LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


def text_of(path):
    return path.read_text(encoding="utf-8")


def without_code(text):
    """`text` without fenced blocks, where # is no heading and brackets are no links."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        again = sum(1 for other in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", other))
        found.add(f"{slug}-{again}" if again else slug)
    return found


def broken_links(page):
    """The relative links of a page that lead nowhere: a file that is not there, or a heading."""
    wrong = []
    for link in _LINK.findall(without_code(text_of(page))):
        name, _, anchor = link.partition("#")
        target = page if not name else page.parent / name
        if not target.exists() or (anchor and anchor not in anchors(text_of(target))):
            wrong.append(link)
    return wrong


def missing_files(text, files):
    """Files named in backticks, by their whole path or its end, that are not among `files`."""
    named = re.findall(r"`([\w/]+\.py)`", text)
    return [name for name in named if not any(file == name or file.endswith("/" + name) for file in files)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", [p for p in PAGES if p != HISTORY], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_is_named_exists(page):
    assert missing_files(text_of(page), FILES) == []


def test_broken_links_and_missing_files_are_seen(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One, `two` & three\n\n```\n# no heading\n```\n## One, two & three\n")
    page.write_text(
        "[a](other.md) [b](other.md#one-two--three) [c](other.md#one-two--three-1) [d](other.md#no-heading)\n"
        "[e](gone.md) [f](https://example.org) [g](#here)\n\n## Here\n"
    )
    assert broken_links(page) == ["other.md#no-heading", "gone.md"]
    assert missing_files("`b.py`, `a/b.py` and `x/a/b.py`, `c.py`", ["x/a/b.py"]) == ["c.py"]


def test_pages_that_code_and_documents_name_exist():
    for path in (*SOURCES, *PAGES):
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", text_of(path)):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def test_commands_in_documents_and_sources_exist():
    found = set()
    for path in (*SOURCES, *PAGES):
        found |= set(re.findall(r"python -m ([\w.]+\w)", text_of(path)))
    assert {"benchmarks.loss", "studies.encoder"} <= found
    for module in found:
        inside = ROOT / module.replace(".", "/")
        first = module.partition(".")[0]
        if (ROOT / first).is_dir():
            assert inside.with_suffix(".py").exists() or (inside / "__main__.py").exists(), module
        else:
            assert find_spec(first) is not None, module


def test_the_table_of_packages_is_in_the_order_of_imports():
    table = text_of(ROOT / "docs/design/README.md").partition("## The packages")[2]
    named = re.findall(r"^\| \[`(\w+)/`\]", table, re.MULTILINE)
    layers = list(dict.fromkeys(part.partition(".")[0] for layer in LAYERS for part in layer))
    packages = [name for name in layers if (ROOT / "balora_plugin" / name).is_dir()]
    assert [name for name in named if name in packages] == packages


def test_the_file_format_names_every_file_and_key(tmp_path):
    page = text_of(ROOT / "docs/file-format.md")
    ba_lora(tiny_llama()).save_pretrained(str(tmp_path))
    keys = json.loads(text_of(tmp_path / "ba_lora.json"))
    for name in (*(path.name for path in tmp_path.iterdir()), *keys, *keys["probe"]):
        assert f"`{name}`" in page, name


def test_the_trainer_of_your_own_trains(tmp_path):
    page = text_of(ROOT / "docs/design/training.md").partition("## Writing a trainer of your own")[2]
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    hooks = {name for name in vars(BaLoraTrainerMixin) if re.match(r"[a-z]+_ba_lora_[a-z]+", name)}
    assert hooks == {name for name in vars(names["MyTrainer"]) if "ba_lora" in name}
    assert all(f"| `{name}(" in page for name in hooks)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], remove_unused_columns=False)
    rows = [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9)), "source": 0}] * 8
    trainer = names["MyTrainer"](model=ba_lora(tiny_llama()), args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.seen == 8 * 5
    with pytest.raises(ValueError, match="MyTrainer"):
        trainer.check_ba_lora_task(trainer.ba_lora.__class__(task="nlu"))
