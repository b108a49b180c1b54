"""FLOP and bytes of the pages are counted as PyTorch counts them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("axolotl")
from balora_plugin import BaLoraConfig, RegularizerConfig, get_ba_lora_model

from .configs.counted import base_head, flop_a_token, gpu_hours
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


def test_hours():
    assert gpu_hours(1e9, 3.6e6, 1e12, used=0.5) == 2.0
