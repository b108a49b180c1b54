"""Small things the adapter and trainer tests share."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model

from balora_plugin import BaLoraConfig, RegularizerConfig, get_ba_lora_model
from balora_plugin.adapter.peft_releases import FUSED_EXPERTS, peft_is
from balora_plugin.pretrained.quantised import is_quantised_linear

reads_experts = pytest.mark.skipif(not peft_is(FUSED_EXPERTS), reason="this PEFT lays experts out in its own way")
counts_what_is_predicted = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.16"), reason="this Trainer counts the first label of a row too"
)


def ba_lora(model, r=4, targets="all-linear", **changes):
    """`model` with a BA-LoRA adapter, alpha = r."""
    values = {"r": r, "lora_alpha": r, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return get_ba_lora_model(model, BaLoraConfig(**{**values, **changes}))


def stock(model, r=4, targets="all-linear", **changes):
    """`model` with a stock PEFT adapter."""
    values = {"r": r, "lora_alpha": r, "target_modules": targets, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**{**values, **changes}))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, ids, steps=5, lr=1e-2):
    """AdamW without weight decay on one batch; returns the losses."""
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def base_parameters(model):
    """Copies of the base model's parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_base_untouched(model, before):
    """Every base parameter inside a wrapped model is bit-equal to `before`."""
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p for name, p in model.named_parameters()
    }
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def quantised_layers(model):
    """The bitsandbytes layers by their name in the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if is_quantised_linear(module)
    }


def stored_weights(model):
    """The bytes of everything that makes up the quantised weights, by layer (as floats some would be NaN)."""
    return {
        name: {
            key: value.detach().reshape(-1).view(torch.uint8).clone()
            for key, value in layer.state_dict().items()
            if isinstance(value, torch.Tensor)
        }
        for name, layer in quantised_layers(model).items()
    }


def assert_stored_weights(model, before):
    """Every quantised weight, scales included, is bit-equal to `before`."""
    after = stored_weights(model)
    assert after.keys() == before.keys()
    for name, values in before.items():
        assert after[name].keys() == values.keys()
        assert all(torch.equal(after[name][key], value) for key, value in values.items()), name


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def fresh(model):
    return copy.deepcopy(model)


TERMS = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.02, lambda_svd=0.02)
