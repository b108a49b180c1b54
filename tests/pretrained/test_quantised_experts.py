"""Fused experts stored in 4 or 8 bits by a parametrization: adapted or not, as the dequantised model would train."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import fresh, logits, reads_experts, train, trainable
from models import tiny_mixtral
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from balora_plugin import BaLoraConfig, BaLoraModel, get_ba_lora_model
from balora_plugin.adapter.delta import DeltaParamWrapper, base_matrix, delta_layers_of
from balora_plugin.adapter.kinds import what_is_adapted
from balora_plugin.commands import main
from balora_plugin.pretrained.quantised_experts import (
    dequantise_experts,
    how_experts_are_stored,
    quantise_experts,
    quantised_experts,
)
from balora_plugin.pretrained.switch import TeacherSwitch

pytestmark = pytest.mark.hosts

pytest.importorskip("bitsandbytes")

HOW = {"4bit": {"bits": 4, "quant_type": "nf4", "double_quant": True}, "8bit": {"bits": 8}}
NAMES = [f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
TARGETS = {"beside": [], "adapted": NAMES}  # whole names, by which PEFT finds parametrized ones


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The full-precision model."""
    path = tmp_path_factory.mktemp("experts")
    tiny_mixtral(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(path)
    return path


def loaded(directory, kind=None):
    model = AutoModelForCausalLM.from_pretrained(directory)
    if kind is not None:
        quantise_experts(model, HOW[kind])
        assert [f"{where}.{name}" for where, _, name in quantised_experts(model)] == NAMES[::-1]
        assert how_experts_are_stored(model) == HOW[kind]
    return model


def dequantised(directory, kind):
    model = loaded(directory, kind)
    dequantise_experts(model)
    assert how_experts_are_stored(model) is None
    return model


def adapt(base, parameters, **changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": parameters or None}
    return get_ba_lora_model(base, BaLoraConfig(**{**values, "task_type": "CAUSAL_LM", **changes}))


def stored(model):
    """{name in the base: packed weight}"""
    found = {}
    for where, module, name in quantised_experts(model):
        key = f"{where}.{name}".replace(".base_layer", "").removeprefix("base_model.model.")
        found[key] = module.parametrizations[name].original.detach().clone()
    return found


def factors(model):
    """{(name, factor): tensor}, in an order that does not know how wrappers are nested."""
    return {
        (getattr(layer, "parameter_name", name), kind): getattr(layer, kind)["default"].weight
        for name, layer in delta_layers_of(model)
        for kind in ("lora_A", "lora_B", "frozen_A", "frozen_B")
    }


@pytest.mark.parametrize("targets", ["beside", pytest.param("adapted", marks=reads_experts)])
@pytest.mark.parametrize("kind", HOW)
def test_trains_as_over_the_dequantised_experts(kind, targets, directory, ids, tmp_path):
    base = loaded(directory, kind)
    before, bytes_before = logits(base, ids), stored(base)
    assert (before - logits(loaded(directory), ids)).abs().max() > 1e-3
    model = adapt(base, TARGETS[targets]).train()
    wrapped = [layer for _, layer in delta_layers_of(model) if isinstance(layer, DeltaParamWrapper)]
    assert len(wrapped) == len(TARGETS[targets])
    for layer in wrapped:  # the start of expert 1
        w = base_matrix(layer)[1]
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        a = layer.frozen_A["default"].weight.reshape(4, 4, -1)[1]
        b = layer.frozen_B["default"].weight.reshape(-1, 4, 4)[:, :, 1]
        torch.testing.assert_close(b @ a, u[:, :4] * s[:4] @ vh[:4], rtol=1e-3, atol=1e-4)
    assert torch.equal(logits(model, ids), before)  # step 0

    reference = adapt(dequantised(directory, kind), TARGETS[targets], init_lora_weights="pissa").train()
    torch.manual_seed(0)
    with torch.no_grad():  # somewhere else than at zero
        for key, value in factors(model).items():
            if key[1].startswith("lora"):
                value.normal_(std=0.05)
            factors(reference)[key].copy_(value)
    for each in (model, reference):
        each(input_ids=ids, labels=ids).loss.backward()
    for key, value in factors(model).items():
        want = factors(reference)[key].grad
        assert (value.grad is None) == (want is None) == key[1].startswith("frozen")
        if want is not None:
            assert want.abs().max() > 1e-4
            torch.testing.assert_close(value.grad, want, rtol=1e-4, atol=1e-6)
    assert len(list(trainable(model))) == 2 * (1 + len(wrapped))

    train(model, ids, steps=2)
    with TeacherSwitch(model).off():
        assert torch.equal(model(input_ids=ids).logits, before)
    after = stored(model)
    assert after.keys() == bytes_before.keys()
    assert all(torch.equal(after[name], value) for name, value in bytes_before.items())
    expected = logits(model, ids)
    assert (expected - before).abs().max() > 0.01
    assert torch.equal(logits(model.eval(), ids), expected)
    model.save_pretrained(tmp_path)
    ours = BaLoraModel.from_pretrained(loaded(directory, kind), tmp_path, is_trainable=True)
    assert torch.equal(logits(ours, ids), expected)
    if not wrapped:
        plain = PeftModel.from_pretrained(loaded(directory, kind), tmp_path)
        torch.testing.assert_close(logits(plain, ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", HOW)
def test_numbers_are_those_of_the_model_not_of_its_bytes(kind, directory):
    here, there = (what_is_adapted(adapt(loaded(directory, each), [])) for each in (kind, None))
    assert (here.base, here.left_out, here.kinds) == (there.base, there.left_out, there.kinds)
    assert any(each.experts == 4 for each in here.left_out)


@pytest.mark.parametrize("kind", HOW)
def test_verify_and_merge_know_how_the_experts_were_stored(kind, directory, ids, tmp_path, capsys):
    model = adapt(loaded(directory, kind), []).train()
    train(model, ids, steps=3)
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "ba_lora.json").read_text())
    assert settings["base_quantization"] == {"experts": HOW[kind]}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "fused experts " + {"4bit": "4-bit (nf4, double quantisation)", "8bit": "8-bit"}[kind] in card
    assert main(["verify", str(tmp_path / "adapter"), "--base", str(directory)]) == 0
    assert "is the recorded one" in capsys.readouterr().out
    arguments = ["export", str(tmp_path / "adapter"), "--merge", "--base", str(directory), "--dtype", "float32"]
    assert main([*arguments, "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-4)
    full = ["--merge-into", "full", "--output", str(tmp_path / "full")]
    assert main([*arguments, *full]) == 0
    kept, files = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "full"))
    experts = [name for name in kept if "expert" in name]
    assert experts and all(torch.equal(files[name], kept[name]) for name in experts)


@reads_experts
def test_a_start_from_other_weights_is_refused_for_quantised_experts(directory):
    with pytest.raises(ValueError, match=r"^start_from=.* linear layers alone .*mlp\.experts\.\w+_proj is a quantised"):
        adapt(loaded(directory, "4bit"), NAMES, start_from=str(directory))


def test_an_exact_copy_has_the_same_identity(directory):
    from balora_plugin.pretrained.identity import base_identity, compare

    model = loaded(directory, "4bit")
    assert compare(base_identity(model), base_identity(fresh(model))) == "same"
    assert compare(base_identity(model), base_identity(dequantised(directory, "4bit"))) == "unclear"
