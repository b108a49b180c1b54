"""Two cases that touch injection and format: a bitsandbytes 4-bit base, and fused 3-D experts."""

from __future__ import annotations

import pytest
import torch
from helpers import fresh, logits, train, trainable
from models import tiny_llama, tiny_mixtral
from peft import PeftModel

from balora_plugin import BaLoraConfig, BaLoraModel, get_ba_lora_model
from balora_plugin.adapter.delta import DeltaParamWrapper, delta_layers_of
from balora_plugin.teacher import quantised_layers_stay_in_training_mode, teacher_mode

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture
def four_bit(tmp_path):
    """Builds a truly 4-bit tiny Llama, twice if asked: from the same full-precision files."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = tmp_path / "base"
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )

    def build():
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, device_map={"": "cpu"})

    return build


def quantised(model):
    return [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]


def adapt(base, **changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_ba_lora_model(base, BaLoraConfig(**{**values, **changes}))


def test_four_bit_base(four_bit, ids, tmp_path):
    base = four_bit().train()
    assert len(quantised(base)) == 14
    packed = [m.weight.data.clone() for m in quantised(base)]
    before = logits(base, ids)
    model = adapt(base).train()
    assert len(quantised(model)) == 14
    assert torch.equal(logits(model, ids), before)  # exact at step 0
    losses = train(model, ids, steps=4)
    assert losses[-1] < losses[0]
    assert all(torch.equal(m.weight.data, p) for m, p in zip(quantised(model), packed, strict=True))
    with teacher_mode(model):
        assert torch.equal(model(input_ids=ids).logits, before)
        assert all(m.training for m in quantised(model))  # eval mode would repack the weight on CPU
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(four_bit().train(), tmp_path / "adapter").train()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=0, atol=1e-5)
    ours = BaLoraModel.from_pretrained(four_bit().train(), tmp_path / "adapter", is_trainable=True).train()
    assert torch.equal(logits(ours, ids), expected)


def test_evaluating_a_four_bit_model_in_mid_training_keeps_its_gradients(four_bit, ids):
    def gradient(model):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        norm = torch.stack([p.grad.norm() for p in trainable(model)]).norm()
        model.zero_grad()
        return norm

    model = adapt(four_bit())
    before = gradient(model)
    model.eval()
    with quantised_layers_stay_in_training_mode(model), torch.no_grad():
        model(input_ids=ids)
    torch.testing.assert_close(gradient(model), before)


EXPERTS = {
    "experts": {
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "target_modules": ["q_proj"],
    },
    "all-linear": {"target_modules": "all-linear"},
}


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
    with teacher_mode(model):
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
