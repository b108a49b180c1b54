"""Factors are believed if they are the leading singular triples of the weight, whatever its spectrum."""

from __future__ import annotations

import pytest
import torch

from balora_plugin.adapter.start.agreement import are_leading_triples
from balora_plugin.adapter.start.pissa import TOLERANCES, pissa_factors

SHAPES = [(48, 40), (40, 150)]


def spectra(n):
    """{name: singular values}."""
    k = torch.arange(n).float()
    return {
        "flat": torch.ones(n),
        "step": torch.where(k < 4, 1.0, 0.1),
        "zero": torch.zeros(n),
        "of rank 3": torch.where(k < 3, 1.0, 0.0),
        "steep": torch.exp(-k),
        "large": 1e6 * torch.exp(-k / 20),
        "small": 1e-15 * torch.exp(-k / 20),
        "one outlier": torch.where(k < 1, 1e4, 1 / (1 + k)),
        "a power law": 1 / (1 + k),
    }


def weights():
    """[(name, weight)] of every spectrum and shape, and of random entries."""
    torch.manual_seed(0)
    found = []
    for shape in SHAPES:
        n = min(shape)
        u, v = (torch.linalg.qr(torch.randn(side, n)).Q for side in shape)
        found += [(f"{name} {shape}", (u * s) @ v.T) for name, s in spectra(n).items()]
        found.append((f"random {shape}", torch.randn(shape)))
    found.append(("bfloat16", torch.randn(SHAPES[0]).bfloat16()))
    found.append(("float64", torch.randn(SHAPES[0]).double()))
    found.append(("experts", torch.randn(3, *SHAPES[0]) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]))
    return found


@pytest.mark.parametrize("method", list(TOLERANCES))
@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize(("name", "weight"), weights())
def test_the_right_ones_are_believed_and_wrong_ones_are_not(name, weight, rank, method):
    for scaling in (1.0, 0.25, 8.0):
        a, b = pissa_factors(weight, rank, scaling, method=method)

        def believed(a, b, scaling=scaling):
            return are_leading_triples(weight, a, b, scaling, method=method)

        assert believed(a, b)
        if name.startswith("zero"):
            assert not believed(a + 1, b)
            continue
        other = pissa_factors(torch.randn(weight.shape) * weight.float().std(), rank, scaling)
        wrong = {
            "another weight's": other,
            "too long": (1.01 * a, 1.01 * b),
            "of another scaling": (a / 1.1, 1.1 * b),
            "nothing": (0 * a, 0 * b),
            "one sign": (a, torch.cat([-b[..., :1], b[..., 1:]], dim=-1)),
            "not finite": (a, b / 0),
        }
        if rank > 1:
            wrong["in another order"] = (a.flip(-2), b)
        for what, (a2, b2) in wrong.items():
            assert not believed(a2.to(a.dtype), b2.to(b.dtype)), what


@pytest.mark.parametrize("method", list(TOLERANCES))
def test_singular_triples_that_are_not_the_leading_ones_are_not_believed(method):
    for name, weight in weights():
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        if s.ndim > 1 or s[0] <= 1.3 * s[2]:
            continue
        root = s[2:4].sqrt()
        factors = root[:, None] * vh[2:4], u[:, 2:4] * root
        assert not are_leading_triples(weight.float(), *factors, 1.0, method=method), name
