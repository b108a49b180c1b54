"""FLOP and bytes of the pages are counted as PyTorch counts them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("axolotl")
from balora_plugin import BaLoraConfig, RegularizerConfig, get_ba_lora_model
from balora_plugin.memory.estimate import GIB

from .configs import glue_hours
from .configs.bases import BASES, Base
from .configs.counted import at_layers, base_head, counted, flop_a_token, gpu_hours
from .models.families import VOCABULARY, tiny

ROOT = Path(__file__).parents[1]
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
    held = sum(whole.held.values())
    assert found.gib * GIB == pytest.approx(held + max(whole.passing.values()), rel=0.01)
    assert found.flop == pytest.approx(sum(whole.flop.values()), rel=1e-6)


def test_hours():
    assert gpu_hours(1e9, 3.6e6, 1e12, used=0.5) == 2.0


def test_flop_of_an_encoder_are_pytorchs(monkeypatch):
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    monkeypatch.setitem(glue_hours.MODELS, "tiny", ("bert", {**sizes, "vocab_size": 64, "hidden_dropout_prob": 0.0}))
    model = glue_hours.on_shapes("tiny", 4)
    model.set_attn_implementation("eager")
    model.enable_input_require_grads()
    rows, length = 2, 24
    ids = torch.ones(rows, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as count:
        model(input_ids=ids).logits.sum().backward()
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=ids)
    expected = count.get_total_flops() / (rows * length)
    work = SimpleNamespace(length=length, checkpointing=False, cached=False, terms=RegularizerConfig().resolved("nlu"))
    # pooler and head see one token a row: all of theirs are counted here, which is little in a model of a real size
    assert glue_hours.flop_a_token(model, {}, work) == pytest.approx(expected, rel=0.05)


@pytest.mark.configs
def test_the_page_has_the_hours_that_are_counted():
    assert glue_hours.table() in (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
