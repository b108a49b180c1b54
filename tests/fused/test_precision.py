"""Products that keep the dtype of their factors, whatever a user lets others be rounded to."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from balora_plugin.adapter.start.agreement import are_leading_triples
from balora_plugin.adapter.start.pissa import TOLERANCES, as_worked_on, pissa_factors
from balora_plugin.fused.precision import exact_products

KINDS = {"cuda": torch.backends.cuda.matmul, "cpu": getattr(torch.backends.mkldnn, "matmul", None)}


@contextmanager
def allowed(device, precision):
    """Inside, a user lets float32 products on a device be rounded."""
    settings = KINDS[device]
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("an older torch")
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield settings
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize("device", KINDS)
def test_what_a_user_allows_is_not_for_these_and_is_as_it_was_afterwards(device):
    like = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
    with allowed(device, "tf32") as settings:
        with exact_products(like):
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "tf32"
        with pytest.raises(KeyError), exact_products(like):
            raise KeyError
        assert settings.fp32_precision == "tf32"
        with exact_products(SimpleNamespace(device=like.device, dtype=torch.float64)):
            assert settings.fp32_precision == "tf32"


@pytest.mark.parametrize("method", TOLERANCES)
def test_the_start_is_the_same_whatever_a_user_allows(method):
    weight = torch.randn(256, 200, generator=torch.Generator().manual_seed(0)) / torch.arange(1, 201)
    expected = pissa_factors(weight, 8, 0.5, method=method)
    with allowed("cpu", "bf16"), torch.autocast("cpu", dtype=torch.bfloat16):
        found = pissa_factors(weight, 8, 0.5, method=method)
        assert are_leading_triples(weight, *expected, 0.5, method=method)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_device_without_float64_leaves_the_work_to_the_cpu():
    weight = torch.randn(3, 2, dtype=torch.bfloat16)
    on_a_mac = SimpleNamespace(device=torch.device("mps"), cpu=lambda: weight)
    on_a_mac.detach = lambda: on_a_mac
    assert torch.equal(as_worked_on(on_a_mac), weight.float())
    assert as_worked_on(weight.double()).dtype == torch.float64
