"""Data in Axolotl of which nothing can be learnt: one clear line before the first step, on its command line too."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("axolotl")
from click.testing import CliRunner

from balora_plugin.hosts.axolotl.errors import SettingError

from .axolotl_run import run

TOKENS = [3, 4, 5]


def rows(path, kind, *values):
    """A dataset of these rows, as a YAML names it."""
    path.write_text("\n".join(json.dumps(value) for value in values))
    return {"datasets": [{"path": str(path), "ds_type": "json", "type": kind}]}


CASES = {
    "rows all dropped by length": (lambda path: {"sequence_len": 4}, "train_dataset has no rows.*sequence_len"),
    "answers all cut off": (
        lambda path: {"sequence_len": 16, "excess_length_strategy": "truncate"},
        "all are -100 in all 12 rows.*prompts longer than the sequence length",
    ),
    "no answers": (
        lambda path: rows(path, "alpaca", *[{"instruction": "a", "input": "", "output": None}] * 4),
        "all are -100 in all 4 rows",
    ),
    "labels that are text": (
        lambda path: rows(path, None, *[{"input_ids": TOKENS, "attention_mask": [1] * 3, "labels": "yes"}] * 4),
        "labels: row 0 of the training data holds text",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_data_of_which_nothing_can_be_learnt(case, written, tmp_path):
    changes, words = CASES[case]
    with pytest.raises(SettingError, match=words):
        run(written(**changes(tmp_path / "rows.jsonl")))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_on_the_command_line_it_is_one_line(written, tmp_path):
    from axolotl.cli.main import cli

    result = CliRunner().invoke(cli, ["train", str(written(sequence_len=4)), "--launcher", "python"])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert [line for line in result.output.splitlines() if line.startswith("Error: ")] == [
        line for line in result.output.splitlines() if "train_dataset has no rows" in line
    ]
