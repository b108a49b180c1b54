"""FLOP and bytes of the pages are counted as PyTorch counts them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("axolotl")
from balora_plugin import BaLoraConfig, RegularizerConfig, get_ba_lora_model
from balora_plugin.memory.estimate import GIB

from .configs.bases import BASES, Base
from .configs.counted import at_layers, base_head, counted, flop_a_token, gpu_hours
from .models.families import VOCABULARY, tiny

ROWS, LENGTH = 2, 24


def flop_of(model, *, teacher, checkpointing):
    """PyTorch's count of a step's products: both passes, the backward pass, and the head's three products."""
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH))
    backbone = model.get_base_model().model
    model.enable_input_require_grads()  # else two layers in three of a tiny model's take no gradient of their input
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FlopCounterMode(display=False) as count:
        backbone(ids, use_cache=False).last_hidden_state.sum().backward()
        if teacher:
            with torch.no_grad(), model.disable_adapter():
                backbone(ids, use_cache=False)
    return count.get_total_flops() / (ROWS * LENGTH) + 2 * base_head(model).numel() * (2 + teacher)


@pytest.mark.parametrize("family", ["llama", "gemma", "mixtral", "ernie4_5_moe"])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flop_are_pytorchs(family, teacher, checkpointing):
    terms = RegularizerConfig(lambda_consistency=float(teacher)).resolved("nlg")
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    base = tiny(family)
    base.set_attn_implementation("eager")  # whose products are all counted, as are those of experts one by one
    if hasattr(base, "set_experts_implementation"):
        base.set_experts_implementation("eager")
    model = get_ba_lora_model(base, config).train()
    work = SimpleNamespace(length=LENGTH, checkpointing=checkpointing, cached=False, terms=terms)
    assert flop_a_token(model, {}, work) == pytest.approx(
        flop_of(model, teacher=teacher, checkpointing=checkpointing), rel=0.05
    )


def test_bytes_and_flop_are_linear_in_the_layers(monkeypatch):
    """So that models of few layers say what one of many takes."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 7, "vocab_size": 96}
    base = Base("llama", {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2})
    monkeypatch.setitem(BASES, "tiny", base)
    values = {"base_model": "tiny", "adapter": "ba_lora", "lora_r": 4, "lora_alpha": 4, "lora_target_linear": True}
    values |= {
        "sequence_len": 32,
        "micro_batch_size": 2,
        "gradient_checkpointing": True,
        "ba_lora": {"preset": "paper"},
    }
    found, whole = counted(values), at_layers(values, 7)
    assert found.gib * GIB == pytest.approx(whole.held + max(whole.passing.values()), rel=0.01)
    assert found.flop == pytest.approx(whole.flop, rel=1e-6)


def test_hours():
    assert gpu_hours(1e9, 3.6e6, 1e12, used=0.5) == 2.0
