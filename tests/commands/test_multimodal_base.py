"""verify and export of an adapter on a multimodal class, of which AutoModelForCausalLM gives another one."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import ba_lora, train
from models import character_tokenizer
from multimodal import text_batch, tiny_multimodal
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from balora_plugin.commands import main

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(base, adapter, logits of the trained model) of a Qwen3.5, whose two classes have other names for its layers."""
    path = tmp_path_factory.mktemp("multimodal")
    base, ids = tiny_multimodal("qwen3_5"), text_batch()["input_ids"]
    base.save_pretrained(path / "base")
    character_tokenizer().save_pretrained(path / "base")
    model = ba_lora(copy.deepcopy(base), r=2, targets=["q_proj", "down_proj"])
    train(model.train(), ids, steps=2)
    model.eval().save_pretrained(path / "adapter")
    with torch.no_grad():
        return path / "base", path / "adapter", model(input_ids=ids).logits


def test_the_trained_class_is_recorded_and_loaded(saved, tmp_path, capsys):
    base, adapter, expected = saved
    assert json.loads((adapter / "ba_lora.json").read_text())["base_class"] == "Qwen3_5ForConditionalGeneration"
    card = (adapter / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "`Qwen3_5ForConditionalGeneration`" in card
    assert main(["verify", str(adapter), "--base", str(base)]) == 0, capsys.readouterr().out
    ids = text_batch()["input_ids"]
    for output, how in ((tmp_path / "plain", []), (tmp_path / "merged", ["--merge"])):
        assert main(["export", str(adapter), "--output", str(output), "--base", str(base), *how]) == 0
        if how:
            model = AutoModelForImageTextToText.from_pretrained(output)
        else:
            assert "AutoModelForImageTextToText" in (output / "README.md").read_text()
            model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), output)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
