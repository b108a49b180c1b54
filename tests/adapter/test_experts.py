"""Fused 3-D experts: targeted parameters instead of layers, in injection and format."""

from __future__ import annotations

import ast
import re

import pytest
import torch
from helpers import fresh, logits, reads_experts, train
from models import tiny_mixtral
from peft import PeftModel

from balora_plugin import BaLoraConfig, BaLoraModel, get_ba_lora_model
from balora_plugin.adapter.delta import DeltaParamWrapper, delta_layers_of
from balora_plugin.commands import main
from balora_plugin.pretrained.switch import TeacherSwitch

pytestmark = pytest.mark.hosts


def adapt(base, **changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_ba_lora_model(base, BaLoraConfig(**{**values, **changes}))


EXPERTS = {
    "experts": {
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "target_modules": ["q_proj"],
    },
    "all-linear": {"target_modules": "all-linear"},
}


@reads_experts
@pytest.mark.parametrize("targets", EXPERTS)
def test_fused_experts(targets, ids, tmp_path):
    base = tiny_mixtral()
    before = logits(base.eval(), ids)
    parameters = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = adapt(fresh(base), **EXPERTS[targets])
    wrapped = [layer for _, layer in delta_layers_of(model) if isinstance(layer, DeltaParamWrapper)]
    assert len(wrapped) >= 2 * 2
    assert torch.equal(logits(model.eval(), ids), before)
    # the start of expert 0: s B0 A0 is the best rank-4 part of its matrix
    layer = next(layer for layer in wrapped if layer.num_experts == 4)
    a = layer.frozen_A["default"].weight.reshape(4, 4, -1)[0]
    b = layer.frozen_B["default"].weight.reshape(-1, 4, 4)[:, :, 0]
    w = layer.get_param()[0].detach()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    best = u[:, :4] * s[:4] @ vh[:4]
    got = b @ a
    torch.testing.assert_close(got if got.shape == w.shape else got.T, best, rtol=1e-3, atol=1e-4)

    losses = train(model.train(), ids, steps=4)
    assert losses[-1] < losses[0]
    after = {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in parameters.items())
    with TeacherSwitch(model).off():
        assert torch.equal(model(input_ids=ids).logits, before)
    expected = logits(model.eval(), ids)
    assert (expected - before).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(fresh(base), tmp_path).eval()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(stock.merge_and_unload(), ids), expected, rtol=0, atol=1e-5)
    ours = BaLoraModel.from_pretrained(fresh(base), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(ours, ids), expected)
    torch.testing.assert_close(logits(ours.merge_and_unload(), ids), expected, rtol=0, atol=1e-5)


def test_a_release_of_peft_that_lays_experts_out_in_its_own_way_is_refused_them(monkeypatch):
    """Their files are read by no later release. The base is left as it was, and everything beside them trains."""
    monkeypatch.setattr("peft.__version__", "0.18.1")
    base = tiny_mixtral()
    names = set(dict(base.named_parameters()))
    with pytest.raises(ValueError, match=r"^target_parameters matches .*experts\.\w+_proj.*install peft >="):
        adapt(base, **EXPERTS["experts"])
    assert set(dict(base.named_parameters())) == names
    assert delta_layers_of(adapt(base, target_modules=["q_proj"]))


@reads_experts
def test_unequal_scalings_in_one_module_are_refused_by_export_with_a_remedy_that_works(ids, tmp_path, capsys):
    """Its file names the module alone, so nothing but a loaded model can tell whose scaling is whose."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    base = tiny_mixtral()
    base.save_pretrained(tmp_path / "base")
    model = adapt(fresh(base), target_parameters=parameters, target_modules=["q_proj"], alpha_pattern={"down_proj": 9})
    train(model.train(), ids, steps=3)
    expected = logits(model.eval(), ids)
    model.save_pretrained(tmp_path / "adapter")
    merging = ["--merge", "--base", str(tmp_path / "base")]
    for extra in ([], merging):
        assert main(["export", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), *extra]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "alpha_pattern=" in line and "mlp.experts.down_proj" in line and "--merge" not in line
    advice = re.search(r"PeftModel\.from_pretrained\(<the full-precision base model>, ('.*?')\)\.merge_and_un", line)
    assert advice is not None
    merged = PeftModel.from_pretrained(fresh(base), ast.literal_eval(advice[1])).merge_and_unload()
    torch.testing.assert_close(logits(merged.eval(), ids), expected, rtol=0, atol=1e-5)
