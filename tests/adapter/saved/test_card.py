"""The section that every saved adapter's README.md has, and that a host's own card keeps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import ba_lora, stock
from huggingface_hub import ModelCard, ModelCardData
from models import tiny_llama

from balora_plugin import BaLoraConfig, RegularizerConfig
from balora_plugin.adapter.saved import card, provenance
from balora_plugin.commands import main, subcommand

pytestmark = pytest.mark.hosts

ROOT = Path(__file__).parents[3]


def text_of(directory):
    return (directory / "README.md").read_text(encoding="utf-8")


def section_of(directory):
    found = re.findall(f"{card.START}(.*?){card.END}", text_of(directory), re.DOTALL)
    assert len(found) == 1
    return found[0]


def row(section, name):
    return next(line.split("|")[2].strip() for line in section.splitlines() if line.startswith(f"| {name} |"))


def test_what_the_card_says(llama, tmp_path):
    terms = RegularizerConfig(preset="iclr2026", lambda_svd=0.0, teacher_interval=4)
    model = ba_lora(llama, r=16, rank_pattern={"q_proj": 2, "down_proj": 24}, regularizers=terms)
    model.peft_config["default"].base_model_name_or_path = "some/base"
    provenance.prepare(model, "a second model, some/other")
    model.save_pretrained(tmp_path)
    said = section_of(tmp_path)
    settings = json.loads((tmp_path / "ba_lora.json").read_text())
    assert row(said, "base model") == "`some/base`"
    assert row(said, "SHA-256 of the base") == f"`{settings['base_sha256']}` (float32)"
    assert "delta form" in row(said, "method")
    assert row(said, "terms in force") == (
        "consistency 0.025 (kl, temperature 2), diversity 0.005 (top 20); schedule iclr2026; "
        "teacher on every 4th row; preset iclr2026"
    )
    assert row(said, "teacher") == settings["teacher"] == "a second model, some/other"
    assert row(said, "rank of the file") == "48, twice the trained rank 24 (smallest layer: 4)"
    assert "--max-lora-rank 48" in said
    assert 'PeftModel.from_pretrained(base, ".")' in said and "--rank 16" in said
    metadata = ModelCard.load(tmp_path / "README.md").data
    assert metadata.library_name == "peft" and "lora" in metadata.tags


def test_every_command_in_a_card_and_in_the_readme_is_one(llama, tmp_path, monkeypatch):
    ba_lora(llama).save_pretrained(tmp_path)
    texts = section_of(tmp_path), (ROOT / "README.md").read_text(encoding="utf-8")
    for text in texts:
        lines = [line for line in text.splitlines() if line.startswith("balora ")]
        assert len(lines) >= 3
        for line in lines:
            arguments = [
                re.sub("[<>]", "", word) for word in shlex.split(line.replace("the base model", "base"), comments=True)
            ]
            monkeypatch.setattr(subcommand(arguments[1]), "run", lambda args: 77)
            assert main(arguments[1:]) == 77, line


def test_a_plain_start_says_its_own_rank(llama, tmp_path):
    ba_lora(llama, init_lora_weights=True, regularizers=RegularizerConfig(lambda_consistency=0.0)).save_pretrained(
        tmp_path
    )
    assert row(section_of(tmp_path), "rank of the file") == "4"
    assert "ordinary LoRA start" in row(section_of(tmp_path), "method")
    assert "consistency" not in row(section_of(tmp_path), "terms in force")


def test_saving_again_replaces_the_section_and_leaves_the_rest(llama, tmp_path):
    model = ba_lora(llama)
    model.get_base_model().add_model_tags(["trl", "sft"])
    model.save_pretrained(tmp_path)
    own = text_of(tmp_path).replace("### Recommendations", "### Recommendations of mine")
    (tmp_path / "README.md").write_text(own)
    model.peft_config["default"].regularizers = RegularizerConfig(lambda_svd=0.5)
    model.save_pretrained(tmp_path)
    assert "singular values 0.5" in section_of(tmp_path)
    after = text_of(tmp_path)
    outside = re.compile(f"{card.START}.*?{card.END}", re.DOTALL)
    assert outside.sub("", after).rstrip() == outside.sub("", own).rstrip()
    assert {"trl", "sft", "lora"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_several_adapters_have_a_part_each(llama, tmp_path):
    model = ba_lora(llama)
    model.add_adapter("second", BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    said = section_of(tmp_path)
    assert said.index("### Adapter `default`, in `.`") < said.index("### Adapter `second`, in `second`")
    assert 'from_pretrained(base, "second")' in said


def test_a_plain_lora_has_no_section(llama, tmp_path):
    stock(llama).save_pretrained(tmp_path)
    assert card.START not in text_of(tmp_path)


CARDS = {
    "hub's": str(ModelCard.from_template(ModelCardData(tags=["a", "b"]))),
    "code before headings": "---\ntags:\n- a\n---\n\n# Title\n\n```yaml\n## no heading\n```\n\n## Usage\n\ntext\n",
    "comment": "# Title\n\n<!-- a\n## no heading\n-->\n\n## Usage\n",
    "no heading": "# Title\n\nOnly text.",
    "nothing": "",
    "windows": "---\r\ntags:\r\n- a\r\n---\r\n# Title\r\n\r\n## Usage\r\n",
}


@pytest.mark.parametrize("name", CARDS)
def test_the_section_is_put_in_without_harm(name):
    before = CARDS[name]
    once = card.with_section(before, "one")
    assert once.count("one\n") >= 1
    twice = card.with_section(once, r"two \1")
    assert card.START in twice and twice.count(card.START) == 1 and r"two \1" in twice
    kept = [line for line in twice.splitlines() if line]
    added = [card.START, r"two \1", card.END]
    assert [line for line in kept if line not in added] == [line for line in before.splitlines() if line]
    if before.startswith("---"):
        assert ModelCard(once).data.to_dict() == ModelCard(before).data.to_dict()
    headings = [line for line in twice.splitlines() if line in ("## Usage", card.START)]
    assert headings in ([card.START, "## Usage"], [card.START])
    if "no heading" in before:
        assert twice.index("## no heading") < twice.index(card.START)


def test_exported_cards_are_valid(ids, tmp_path, capsys):
    from balora_plugin.commands import main

    ba_lora(tiny_llama()).save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), "--rank", "2"]) == 0
    exported = ModelCard.load(tmp_path / "out" / "README.md")
    assert exported.data.library_name == "peft" and "max_lora_rank" in exported.text


def test_a_hosts_card_names_a_local_base_and_leaves_the_hubs_alone(llama, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    hub = "[some/model](https://huggingface.co/some/model)"
    links = f"of [None](https://huggingface.co/None), [{base}](https://huggingface.co/{base}) and {hub}.\n"
    model = ba_lora(llama)
    model.peft_config["default"].base_model_name_or_path = str(base)
    (tmp_path / "README.md").write_text(f"# Model\n\n{links}")
    card.update(tmp_path, model)
    assert f"of `{base}`, `{base}` and {hub}.\n" in text_of(tmp_path)
    assert card.naming_a_local_base(links, None).startswith("of a model without a name, ")
