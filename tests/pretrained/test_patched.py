"""A model that Unsloth has patched is refused by name, wherever it did so. Unsloth itself is faked."""

from __future__ import annotations

import types

import pytest
from models import tiny_llama
from transformers import TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

from balora_plugin import BaLoraConfig, BaLoraTrainer, get_ba_lora_model
from balora_plugin.pretrained.patched import check_unpatched

pytestmark = pytest.mark.hosts


def fast(self, hidden_states, *args, **kwargs):
    """As its kernels: lora_A and lora_B are read here, A0 and B0 are not."""
    return hidden_states


def unsloths(function, module):
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    made.__module__ = module
    return made


def patch_method(model):
    model.model.layers[0].mlp.forward = types.MethodType(
        unsloths(fast, "unsloth.kernels.fast_lora"), model.model.layers[0].mlp
    )


def patch_attribute(model):
    model.model.layers[1].self_attn.apply_qkv = unsloths(fast, "unsloth.kernels.fast_lora")


def patch_class(model):
    compiled = type("LlamaMLP", (LlamaMLP,), {"__module__": "unsloth_compiled_cache.llama"})
    model.model.layers[0].mlp.__class__ = compiled


PATCHES = {"method": patch_method, "attribute": patch_attribute, "class": patch_class}


@pytest.mark.parametrize("kind", PATCHES)
def test_a_patched_model_gets_no_adapter_and_stays_as_it_was(kind):
    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]
    check_unpatched(model)
    PATCHES[kind](model)
    with pytest.raises(ValueError, match=r"^Unsloth has patched model\.layers\.\d.*unsloth.*AutoModelForCausalLM"):
        get_ba_lora_model(model, BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    assert [name for name, _ in model.named_parameters()] == names


def test_one_that_is_patched_behind_the_adapter_does_not_train(tmp_path):
    model = get_ba_lora_model(tiny_llama(), BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    patch_attribute(model.get_base_model())
    with pytest.raises(ValueError, match=r"^Unsloth has patched"):
        BaLoraTrainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
