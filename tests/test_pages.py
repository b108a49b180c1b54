"""Pages as the site has them: all in its navigation, generated ones up to date, blocks and commands of them read."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex

import pytest
import yaml
from test_docs import HISTORY, PAGES, ROOT, text_of

from balora_plugin.commands import main, subcommand

DOCS = ROOT / "docs"
README = text_of(ROOT / "README.md")
SITE = [page for page in PAGES if page != HISTORY and "tests" not in page.relative_to(ROOT).parts]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
# pages whose python is run: by integration/test_examples.py, by tests/test_docs.py, by nobody (it needs a hub)
RUN = {"README.md", "docs/train.md", "docs/classification.md"}
RUN_ELSEWHERE = {"docs/design/training.md", "docs/glue.md"}


def blocks(text, *languages):
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```([\w-]*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [code for language, code in found if language in languages]


def commands(text):
    """The command lines of a page's shell blocks as words, continued lines joined, without comments."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose one tag names a function."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def navigation(*sections):
    """The pages of the site's navigation, of these sections or all."""

    def leaves(entry):
        if isinstance(entry, dict):
            return [leaf for value in entry.values() for leaf in leaves(value)]
        return [leaf for one in entry for leaf in leaves(one)] if isinstance(entry, list) else [entry]

    nav = yaml.load(text_of(ROOT / "mkdocs.yml"), Loader)["nav"]
    return leaves([entry for entry in nav if not sections or set(sections) & set(entry)])


def test_every_page_is_in_the_navigation_once():
    written = [page.relative_to(DOCS).as_posix() for page in SITE if page.is_relative_to(DOCS)]
    made = ["index.md", "changelog.md", "contributing.md", *(f"notebooks/{one.stem}.md" for one in NOTEBOOKS)]
    named = navigation()
    outside = [name for name in named if name.startswith("repository/")]
    assert sorted([*written, *made]) == sorted(name for name in named if name not in outside)
    assert all((ROOT / name.removeprefix("repository/")).exists() for name in outside)


def test_the_page_of_the_command_line_is_up_to_date():  # docs/settings.md: tests/test_settings.py
    made = runpy.run_path(str(DOCS / "cli.py"))["page"]()
    assert text_of(DOCS / "cli.md") == made, "python docs/cli.py writes it anew"


def test_the_table_of_what_is_logged_is_up_to_date():
    written = text_of(DOCS / "logs.md")
    assert written == runpy.run_path(str(DOCS / "logs.py"))["page"](written), "python docs/logs.py writes it anew"


def numbers(row):
    """The numbers of a table's row, as written; those of its first cell aside."""
    return re.findall(r"(?<![\w.])\d+\.\d+", row.partition("|")[2].partition("|")[2])


def row_of(text, begins):
    """The one row of the text's tables that begins so."""
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {begins}"))
    return row


def test_the_figures_of_the_study_are_those_of_its_report():
    report = text_of(ROOT / "studies" / "forgetting" / "report.md").partition("## All points")[2]
    means = {
        name: [cell.split()[0] for cell in row_of(report, f"{name}, 24 steps |").split(" | ")[2:5]]
        for name in ("lora-1e-3", "lora-cr0.3", "pissa-3e-4", "pissa-cr0.3", "pissa-1e-4", "lora-decay")
    }
    choose = text_of(DOCS / "choose.md")
    for row, without, held in (("LoRA, 1e-3", "lora-1e-3", "lora-cr0.3"), ("PiSSA, 3e-4", "pissa-3e-4", "pissa-cr0.3")):
        assert numbers(row_of(choose, row)) == [
            x for pair in zip(means[without], means[held], strict=True) for x in pair
        ]
    for other in ("pissa-1e-4", "lora-decay"):
        assert "task loss {}, drift {} and {})".format(*means[other]) in " ".join(choose.split())
    (task, drift, _), (held_task, held_drift, _) = means["lora-1e-3"], means["lora-cr0.3"]
    said = f"drift {float(held_drift):.2f} instead of {float(drift):.2f}, task loss {held_task} instead of {task}"
    assert said in README
    points = text_of(ROOT / "studies" / "forgetting" / "report.md").partition("## All points")[0]
    below = float(row_of(points, "lora-cr0.3, 24 steps |").split(" | ")[2].split()[0])  # minus the rivals' front
    assert f"comes below {float(held_drift) - below:.2f} at that loss" in README


def test_the_figures_of_anchors_are_those_of_the_report():
    report = text_of(ROOT / "studies" / "forgetting" / "report.md")
    points = report.partition("## All points")
    choose = text_of(DOCS / "choose.md")
    for row, name in (("1, LoRA, 1e-3", "lora-cr1"), ("0.3, PiSSA, 3e-4", "pissa-cr0.3")):
        pair = []
        for method in (name, f"{name}-anchors"):
            loss, _, instructions, documentation = row_of(points[2], f"{method}, 24 steps |").split(" | ")[2:6]
            pair.append([cell.split()[0] for cell in (loss, documentation, instructions)])
        assert numbers(row_of(choose, row)) == [x for each in zip(*pair, strict=True) for x in each]
    (_, drift, _), (_, held, _) = (
        [row_of(points[2], f"{method}, 24 steps |").split(" | ")[n].split()[0] for n in (2, 5, 4)]
        for method in ("lora-cr1", "lora-cr1-anchors")
    )
    assert f"from {drift} to {held}" in " ".join(README.split())
    below = row_of(points[0], "lora-cr1-anchors, 24 steps |").split(" | ")[4]
    assert below.startswith("-0.004 [-0.005, -0.002] *") and "(by 0.004, interval 0.002 to 0.005)" in " ".join(
        choose.split()
    )


def test_what_is_left_of_a_fault_is_what_the_report_says():
    report = text_of(ROOT / "studies" / "inheritance" / "report.md")
    noise, imbalance, colour = (part.partition("| minus lora |")[0] for part in report.split("\n## ")[2:5])
    table = text_of(DOCS / "study.md").partition("in shares of the fault that are left")[2]
    rows = {
        "LoRA": "lora",
        "PiSSA": "pissa",
        "BA-LoRA, `paper`": "ba-paper",
        "BA-LoRA, `iclr2026`": "ba-iclr2026",
        "PiSSA, consistency 0.3": "consistency-0.3",
        "full fine-tuning": "full",
    }
    for shown, method in rows.items():
        of_noise, *others = (
            re.findall(r"\((-?\d+ %)\)", row_of(part, f"{method} |")) for part in (noise, imbalance, colour)
        )
        left = [of_noise[0], of_noise[3], *(of[0] for of in others)]
        assert [cell.strip() for cell in row_of(table, f"{shown} |").strip(" |").split("|")[1:]] == left


def test_what_a_run_says_is_in_its_record():
    run = json.loads(text_of(ROOT / "studies" / "forgetting" / "runs" / "pissa-cr0.3-s1.json"))
    base = json.loads(text_of(ROOT / "studies" / "forgetting" / "runs" / "base.json"))
    logged = run["history"][-1]
    table = README.partition("## What a run says")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"^\| `(\S+)` \| (\S+) \|", table, re.MULTILINE))
    assert shown.pop("learning_rate") == "0.0003"
    (last,) = (point["task"] for point in run["points"] if point["step"] == 24)
    tokens = sum(base["tokens"]["task"])
    logged |= {"eval_loss": sum(last["loss"]) / tokens, "eval_balora/drift": sum(last["drift"]) / tokens}
    assert shown == {key: f"{logged[key]:.3f}" for key in shown} and len(shown) == 7


def test_every_python_block_can_be_compiled_and_is_run_somewhere():
    found = {page.relative_to(ROOT).as_posix(): blocks(text_of(page), "python") for page in SITE}
    for page, codes in found.items():
        for code in codes:
            compile(code, page, "exec")
    assert {page for page, codes in found.items() if codes} == RUN | RUN_ELSEWHERE


def test_every_yaml_block_can_be_read_and_its_settings_are_some():
    pytest.importorskip("pydantic")
    from balora_plugin.hosts.axolotl.block import BaLoraBlock

    found = [yaml.safe_load(code) for page in SITE for code in blocks(text_of(page), "yaml")]
    settings = [values["ba_lora"] for values in found if "ba_lora" in values]
    assert len(settings) >= 5
    for values in settings:
        BaLoraBlock.model_validate(values)


def test_every_command_can_be_parsed(monkeypatch):
    seen, makefile = set(), text_of(ROOT / "Makefile")
    for words in (words for page in SITE for words in commands(text_of(page))):
        assert all((ROOT / word).exists() for word in words if word.startswith("example_configs/")), words
        if words[0] == "balora":
            monkeypatch.setattr(subcommand(words[1]), "run", lambda asked: 77)
            assert main(words[1:]) == 77, words
            seen.add(words[1])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        else:
            assert words[0] in {"accelerate", "axolotl", "hf", "ollama", "pip", "python", "swift", "vllm"}, words
    assert seen == set(runpy.run_path(str(DOCS / "cli.py"))["names"]())


def test_make_targets_in_prose_exist():
    makefile = text_of(ROOT / "Makefile")
    for page in SITE:
        for target in re.findall(r"`make ([\w-]+)", text_of(page)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page.name, target)


def paragraphs(text):
    """Paragraphs of prose: no headings, tables, lists, code, pictures."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    parts = [part.strip("\n").splitlines() for part in re.split(r"\n\s*\n", plain)]
    return [part for part in parts if part and not re.match(r"#|\||- |\d\. |<|!", part[0])]


def test_the_readme_is_a_screen_and_a_half():
    assert len(README.splitlines()) <= 130


def test_paragraphs_of_what_is_read_first_are_short():
    guides = [DOCS / name for name in navigation("Start", "Use") if not name.startswith("notebooks/")]
    for page in (ROOT / "README.md", *guides):
        assert [part[0] for part in paragraphs(text_of(page)) if len(part) > 5] == [], page.name


def texts_of(path):
    """Every text that a source file can say, what is filled in as one NUL."""
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)


def test_troubleshooting_quotes_what_is_said():
    said = {text for path in (ROOT / "balora_plugin").rglob("*.py") for text in texts_of(path)}
    rows = re.findall(r"^\| (`[^|]*`) \|", text_of(DOCS / "troubleshooting.md"), re.MULTILINE)
    assert len(rows) >= 30
    for row in rows:
        pattern = ".*".join(re.escape(part) for part in row.strip("`").split("..."))
        assert any(re.search(pattern.strip(), text, re.DOTALL) for text in said), row


def test_the_picture_shows_the_runs_that_there_are(tmp_path):
    pytest.importorskip("matplotlib")
    from studies.forgetting import picture

    assert picture.main([str(tmp_path / "drift.svg")]) == 0
    made, kept = (
        re.findall(r"<text[^>]*>([^<]+)<", text_of(path)) for path in (tmp_path / "drift.svg", picture.PICTURE)
    )
    assert kept == made, "python -m studies.forgetting.picture draws it anew"
