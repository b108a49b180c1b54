"""One strict reader of adapter_config.json: an option of another type is one line that names file and key."""

from __future__ import annotations

import json

import pytest
from exporting import refused
from helpers import stock
from models import tiny_llama

from balora_plugin.checkpoint.lora_config import read_adapter_config

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_pattern": [1]}, "rank_pattern is [1], not ranks from 1 to"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern is {'q': 'x'}, not numbers > 0"),
        ({"r": "4"}, "r is '4', not a whole number from 1 to"),
        ({"target_modules": 3}, "target_modules is 3, not a list of names, or a regular expression"),
        ({"lora_dropout": 2}, "lora_dropout is 2, not a number from 0 to 1"),
    ],
)
def test_what_no_lora_has_is_one_line(changes, said, tmp_path, capsys):
    stock(tiny_llama(), targets=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    assert read_adapter_config(path)["r"] == 4
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for words in (["export", tmp_path, "--output", tmp_path / "out"],):
        line = refused(capsys, *words)
        assert f"{path}: {said}" in line and line.endswith("copy or save the adapter again.")


def test_of_another_kind_nothing_is_asked(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "IA3", "target_modules": 3}')
    assert read_adapter_config(path)["target_modules"] == 3
