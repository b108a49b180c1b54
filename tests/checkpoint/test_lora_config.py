"""One strict reader of adapter_config.json: an option of another type is one line that names file and key."""

from __future__ import annotations

import json

import pytest
from exporting import refused, run
from helpers import stock
from models import tiny_llama

from balora_plugin.checkpoint.json_file import read_record
from balora_plugin.checkpoint.location import AdapterFiles
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


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("r", "r is missing: copy"),
        ("lora_alpha", "lora_alpha is missing: copy"),
        ("peft_type", "peft_type is missing: copy"),
        ("target_modules", "target_modules, which is missing, does not name model.layers.0.self_attn.q_proj, whose"),
    ],
)
def test_what_peft_would_put_a_value_of_its_own_for_is_one_line(key, said, tmp_path, capsys):
    stock(tiny_llama(), targets=["q_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name != key}))
    assert f"{path}: {said}" in refused(capsys, "export", tmp_path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_factors_that_no_target_names_are_one_line(tmp_path, capsys):
    """PEFT leaves such factors out without a word."""
    stock(tiny_llama(), targets=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["q_proj"]}))
    said = "target_modules=['q_proj'] does not name model.layers.0.self_attn.v_proj, whose factors"
    assert f"{path}: {said}" in refused(capsys, "export", tmp_path, "--output", tmp_path / "out")


def test_targets_that_a_base_does_not_have_name_the_adapter(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    stock(tiny_llama(), targets=["q_proj"]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": "x"}))
    words = ["export", tmp_path / "adapter", "--merge", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    assert f"'{tmp_path}/adapter' does not fit this base: Target modules x not found" in refused(capsys, *words)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_what_stock_peft_does_not_load_is_a_mismatch(key, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    stock(tiny_llama(), targets=["q_proj"]).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: None}))
    code, out, _ = run(capsys, "verify", tmp_path / "adapter", "--base", tmp_path / "base")
    assert code == 1 and "does not fit this model" in out


def test_a_directory_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    assert AdapterFiles(str(tmp_path)).find("adapter_config.json") is None
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=rf"{tmp_path}' may not be read: change its permissions"):
        AdapterFiles(str(tmp_path)).find("adapter_config.json")


@pytest.mark.parametrize(("text", "said"), [("", "is not JSON"), ("[]", "holds a list"), ('{"a": 1}', "has no 'b'")])
def test_a_record_that_is_not_whole_says_what_to_do(text, said, tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"a": NaN, "b": 1}')
    assert read_record(path, ("a", "b"))["b"] == 1
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"record\.json {said}.*remove the file, and its run is made again"):
        read_record(path, ("a", "b"))


def test_of_another_kind_nothing_is_asked(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "IA3", "target_modules": 3}')
    assert read_adapter_config(path)["target_modules"] == 3
