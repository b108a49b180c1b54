"""What Axolotl does before it injects a LoRA is done before ours: its patches of PEFT, its choice of linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("axolotl")

from architectures import FALCON_H1, LEFT_OUT, tiny
from axolotl.loaders import adapter as theirs
from axolotl.utils.dict import DictDefault
from helpers import ba_lora, fresh, logits, train
from models import tiny_mixtral
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from balora_plugin import BaLoraModel
from balora_plugin.adapter.kinds import what_is_adapted
from balora_plugin.hosts.axolotl.injection import PATCHES, target_modules
from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin

EXPERTS = {"lora_target_modules": ["q_proj", "w1", "w2", "w3"], "lora_dropout": 0.5}  # names of before they were fused


def settings(**changes):
    values = {"adapter": "ba_lora", "lora_r": 4, "lora_alpha": 4, "output_dir": "nowhere", **changes}
    return DictDefault(values)


@pytest.fixture
def unpatched(monkeypatch):
    """PEFT as it was, before and after: Axolotl's patch stays for the life of a process."""
    original = ParamWrapper.__init__
    if getattr(original, "__name__", "") == "_patched_init":
        original = next(cell.cell_contents for cell in original.__closure__ if callable(cell.cell_contents))
    monkeypatch.setattr(ParamWrapper, "__init__", original)
    monkeypatch.setattr(ParamWrapper, "_axolotl_dropout_patched", False, raising=False)


def dropout(model):
    """{name of an adapted layer: its adapter's dropout}"""
    return {
        name: getattr(layer.lora_dropout["default"], "p", 0.0)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def test_dropout_beside_fused_experts_is_that_of_axolotls_own_lora(unpatched, ids, tmp_path):
    base = tiny_mixtral()
    with pytest.raises(ValueError, match=r"lora_dropout=0\.5 with fused experts .*lora_dropout=0\.0"):
        ba_lora(fresh(base), lora_dropout=0.5)  # as PEFT refuses it outside of Axolotl
    ours, config = BaLoraPlugin()._load(fresh(base), settings(**EXPERTS), False, False)
    stock, _ = theirs.load_lora(fresh(base), settings(**EXPERTS, adapter="lora"))
    assert dropout(ours) == dropout(stock)
    assert set(dropout(ours).values()) == {0.0, 0.5} and config.lora_dropout == 0.5
    assert torch.equal(logits(ours.eval(), ids), logits(base.eval(), ids))
    train(ours.train(), ids, steps=2)
    expected = logits(ours.eval(), ids)
    ours.save_pretrained(tmp_path)

    continued, _ = BaLoraPlugin()._load(fresh(base), settings(lora_model_dir=str(tmp_path), **EXPERTS), False, False)
    assert dropout(continued) == dropout(ours)
    assert torch.equal(logits(continued.eval(), ids), expected)


@pytest.fixture
def saved(unpatched, ids, tmp_path):
    """(base, directory of an adapter trained with dropout beside experts, its logits), PEFT as it was."""
    base = tiny_mixtral().eval()
    original = ParamWrapper.__init__
    model, _ = BaLoraPlugin()._load(fresh(base), settings(**EXPERTS), False, False)
    train(model.train(), ids, steps=2)
    model.save_pretrained(tmp_path)
    ParamWrapper.__init__ = original
    return base, tmp_path, logits(model.eval(), ids)


def test_it_is_used_where_peft_is_not_patched(saved, ids):
    base, directory, expected = saved
    plain = PeftModel.from_pretrained(fresh(base), directory).eval()
    torch.testing.assert_close(logits(plain, ids), expected, rtol=0, atol=1e-5)
    ours = BaLoraModel.from_pretrained(fresh(base), directory)
    assert torch.equal(logits(ours.eval(), ids), expected)
    assert ours.peft_config["default"].lora_dropout == 0.5  # what it was trained with
    with pytest.raises(ValueError, match=r"lora_dropout=0\.5 with fused experts"):
        BaLoraModel.from_pretrained(fresh(base), directory, is_trainable=True)


@pytest.mark.parametrize("name", PATCHES)
def test_an_axolotl_without_a_patch_is_named(name, monkeypatch):
    assert callable(getattr(theirs, name))
    monkeypatch.delattr(theirs, name)
    with pytest.raises(ImportError, match=rf"axolotl .*{name}"):
        BaLoraPlugin()._load(tiny_mixtral(), settings(lora_target_modules=["q_proj"]), False, False)


@pytest.mark.parametrize("model_type", ["llama4_text", "falcon_h1"])
def test_lora_target_linear_is_all_linear_where_both_have_no_experts(model_type):
    base = tiny(model_type, **{**LEFT_OUT, "falcon_h1": (FALCON_H1, [])}[model_type][0])
    names = target_modules(settings(lora_target_linear=True), base)
    here, there = (
        what_is_adapted(ba_lora(fresh(base), targets=targets, init_lora_weights=True))
        for targets in (names, "all-linear")
    )
    assert set(here.kinds) == set(there.kinds) and set(here.left_out) == set(there.left_out)


def test_the_head_is_left_out_by_what_it_is(ids):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    base = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))
    assert target_modules(settings(lora_target_linear=True), base) == [
        "dense",
        "dense_4h_to_h",
        "dense_h_to_4h",
        "query_key_value",
    ]
    base.gpt_neox.layers[0].extra = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("embed_out", "lm_head")})
    head = next(name for name, module in base.named_modules() if module is base.get_output_embeddings())
    found = target_modules(settings(lora_target_linear=True), base)
    assert head not in found and f"gpt_neox.layers.0.extra.{head}" in found
