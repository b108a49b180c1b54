"""A rank beyond what a matrix has: all of it starts, the rest is zero and stays so."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import ba_lora, fresh, logits, reads_experts, train
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_llama, tiny_mixtral
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from balora_plugin import BaLoraConfig, BaLoraModel, get_ba_lora_model
from balora_plugin.adapter.delta import delta_layers_of, num_experts
from balora_plugin.adapter.peft_releases import FUSED_EXPERTS, peft_is
from balora_plugin.adapter.start import disk_cache

pytestmark = pytest.mark.hosts


class Experts(nn.Module):
    """Fused experts, each on all inputs: (..., in) -> (..., experts, out)."""

    def __init__(self, experts, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, out_features, in_features))

    def forward(self, x):
        return torch.einsum("eoi,...i->...eo", self.weight, x)


KINDS = {
    "linear": lambda out, inner: nn.Linear(inner, out),
    "conv1d": lambda out, inner: Conv1D(out, inner),
    "experts": lambda out, inner: Experts(3, out, inner),
}


@st.composite
def layers(draw):
    """(base in float64, targets, changes of the config) of one layer; the rank is often more than the matrix has."""
    kind = draw(st.sampled_from(sorted(KINDS if peft_is(FUSED_EXPERTS) else KINDS.keys() - {"experts"})))
    torch.manual_seed(draw(st.integers(0, 99)))
    base = nn.ModuleDict({"layer": KINDS[kind](draw(st.integers(1, 7)), draw(st.integers(1, 7)))}).double()
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    targets = {"target_parameters": ["layer.weight"]} if kind == "experts" else {"target_modules": ["layer"]}
    rank = draw(st.integers(1, 12))
    start = draw(st.sampled_from(["pissa", "pissa_fast", "pissa_exact"]))
    values = {"r": rank, "lora_alpha": draw(st.integers(1, 20)), "use_rslora": draw(st.booleans())}
    return base, {**targets, **values, "init_lora_weights": start, "fan_in_fan_out": kind == "conv1d"}


def adapted(base, values):
    """A model, its one layer in delta form, and the base weight as (experts, out, in)."""
    model = get_ba_lora_model(fresh(base), BaLoraConfig(**values))
    ((_, layer),) = delta_layers_of(model)
    weight = base["layer"].weight.detach()
    weight = weight.T if isinstance(base["layer"], Conv1D) else weight
    return model, layer, weight if weight.ndim == 3 else weight[None]


def dense(layer):
    """The layer's four factors by expert: A (E, r, in), B (E, out, r)."""
    experts = num_experts(layer)
    a, d_a = (getattr(layer, n)["default"].weight for n in ("frozen_A", "lora_A"))
    b, d_b = (getattr(layer, n)["default"].weight for n in ("frozen_B", "lora_B"))
    a, d_a = (x.reshape(experts, -1, x.shape[1]) for x in (a, d_a))
    b, d_b = (x.reshape(x.shape[0], -1, experts).permute(2, 0, 1) for x in (b, d_b))
    return a, b, d_a, d_b


def steps(model, layer, x, target):
    """Three of AdamW with a weight decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        ((model.base_model.model["layer"](x) - target) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@settings(max_examples=40, deadline=None)
@given(layers())
def test_the_part_that_trains_is_the_whole_matrix_and_the_rest_stays_zero(case):
    base, values = case
    model, layer, weight = adapted(base, values)
    used, scaling = min(values["r"], *weight.shape[-2:]), layer.scaling["default"]
    a, b, _, _ = dense(layer)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    best = (u[..., :used] * s[..., None, :used]) @ vh[..., :used, :]
    torch.testing.assert_close(scaling * b @ a, best, rtol=0, atol=1e-9)
    x = torch.randn(5, weight.shape[-1], dtype=torch.float64)
    here = model.base_model.model["layer"]
    assert torch.equal(here(x), base["layer"](x))  # the first step's model is the base

    # a twin of the rank that the matrix has, with the same scaling, trains to the same
    alike = {**values, "r": used, "use_rslora": False, "lora_alpha": scaling * used}
    twin, twins_layer, _ = adapted(base, alike)
    target = torch.randn_like(base["layer"](x))
    steps(model, layer, x, target)
    steps(twin, twins_layer, x, target)
    torch.testing.assert_close(here(x), twin.base_model.model["layer"](x), rtol=0, atol=1e-9)

    a, b, d_a, d_b = dense(layer)
    for rest in (a[:, used:], d_a[:, used:], b[..., used:], d_b[..., used:]):
        assert not rest.any()
    assert d_a.any() and d_b.any()
    moved = weight + scaling * ((b + d_b) @ (a + d_a) - b @ a)
    expected = torch.einsum("eoi,ni->neo", moved, x)
    bias = getattr(base["layer"], "bias", None)
    expected = expected if isinstance(base["layer"], Experts) else expected[:, 0] + bias
    torch.testing.assert_close(here(x), expected, rtol=0, atol=1e-9)


@reads_experts
@pytest.mark.parametrize("start", ["pissa", "pissa_fast", "pissa_exact"])
def test_a_mixture_of_experts_at_a_rank_beyond_its_matrices(start, ids, tmp_path, caplog):
    base = tiny_mixtral().eval()
    with caplog.at_level(logging.WARNING):
        model = ba_lora(fresh(base), r=40, rank_pattern={"k_proj": 64}, init_lora_weights=start).eval()
    (said,) = [record.message for record in caplog.records if "singular values" in record.message]
    assert "14 of 14 adapted matrices" in said and "2 mlp.gate.weight (4 x 32) at rank 40 of which 4 train" in said
    assert "2 self_attn.k_proj (16 x 32) at rank 64 of which 16 train" in said
    assert (
        "2 mlp.experts.gate_up_proj (4 experts of 96 x 32) at rank 80 of which 32 train" in said
    )  # PEFT doubles what it fuses
    assert torch.equal(logits(model, ids), logits(base, ids))
    train(model.train(), ids, steps=2)
    expected = logits(model.eval(), ids)
    assert (expected - logits(base, ids)).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(fresh(base), tmp_path).eval()
    torch.testing.assert_close(logits(plain, ids), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(plain.merge_and_unload(), ids), expected, rtol=0, atol=1e-5)
    again = BaLoraModel.from_pretrained(fresh(base), tmp_path, is_trainable=True)
    assert torch.equal(logits(again.eval(), ids), expected)
    assert train(again.train(), ids, steps=2) == train(model.train(), ids, steps=2)


def test_nothing_is_said_where_every_matrix_has_the_rank(caplog):
    with caplog.at_level(logging.WARNING):
        ba_lora(tiny_llama(), r=16)
    assert "singular values" not in caplog.text


@pytest.mark.parametrize("method", ["pissa", "pissa_fast", "pissa_exact"])
def test_factors_of_a_small_matrix_are_kept_on_disk_and_believed(method, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_cache, "SMALLEST", 0)
    weight = torch.randn(2, 6, 9)
    made = disk_cache.StartCache(tmp_path)
    first = made.factors(weight, 20, 0.5, method=method)
    assert [tuple(x.shape) for x in first] == [(2, 6, 9), (2, 6, 6)]
    found = disk_cache.StartCache(tmp_path)
    again = found.factors(weight, 40, 0.5, method=method)  # every rank beyond the matrix is the same start
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert (found.found, found.computed) == (1, 0)
