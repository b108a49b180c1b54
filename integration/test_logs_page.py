"""docs/logs.md: every key that a run logs stands in it, and none stands in it that no run logs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from balora_plugin import RegularizerConfig

from .nlu_training import build as classifier_run

PAGE = (Path(__file__).parents[1] / "docs" / "logs.md").read_text(encoding="utf-8")


def rows(heading):
    """The rows of the table under a heading, as cells."""
    table = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in row.split(" | ")] for row in re.findall(r"^\| (`.*) \|$", table, re.MULTILINE)]


def own_keys():
    """BA-LoRA's keys of the page, with those of an evaluation as the column says."""
    keys = set()
    for name, *_, evaluated, _ in rows("BA-LoRA's keys"):
        key = name.strip("`")
        keys |= {"yes": {key, f"eval_{key}"}, "no": {key}, "only": {key}, "end": {key}}[evaluated]
    return keys


def host_keys(*hosts):
    """The hosts' keys of the page."""
    found = [(names, host) for names, _, host, *_ in rows("The host's keys beside them") if host in hosts]
    return {key.strip("`") for names, _ in found for key in names.split(", ")}


def logged(trainer):
    """What a run has logged, with its evaluations."""
    trainer.train()
    return set().union(*trainer.state.log_history)


def classifiers(tmp_path):
    terms = RegularizerConfig(preset="iclr2026", schedule="constant", share_interval=1, monitor=True)
    return logged(
        classifier_run(tmp_path / "nlu", terms=terms, max_steps=2, eval_strategy="steps", eval_steps=2, max_grad_norm=1)
    )


def test_the_page_has_every_key_and_no_other(tmp_path, tokenizer):
    pytest.importorskip("trl")
    from .test_trl import adapter, build

    anchors = tmp_path / "anchors.txt"
    anchors.write_text("\n\n".join(f"text number {i}" for i in range(20)))  # enough that some are held out
    terms = RegularizerConfig(
        drift_target=0.1,
        balance={"diversity": 0.1, "svd": 0.01},
        anchor_data=str(anchors),
        anchor_fraction=1.0,
        monitor=True,
    )
    often = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    language = logged(build(tmp_path, tokenizer, evaluate=True, peft_config=adapter(regularizers=terms), **often))
    assert language | classifiers(tmp_path) == own_keys() | host_keys("all", "TRL")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("axolotl") is None, reason="needs Axolotl")
def test_axolotls_keys_are_there_too(written):
    from .axolotl_run import run

    trainer = run(written(val_set_size=3, eval_steps=2, max_steps=2))  # a speed needs two steps
    found = set().union(*trainer.state.log_history)
    assert found - own_keys() == host_keys("all", "Axolotl")
