"""The iteration of the start: what it says of its energy holds against an SVD, whatever the spectrum."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from balora_plugin.adapter.start.agreement import are_leading_triples
from balora_plugin.adapter.start.pissa import TOLERANCES, pissa_factors
from balora_plugin.adapter.start.subspace import is_worth_it, leading_triples

SIDE = 256


def around(rank, copies, value, tail):
    """2 before `copies` of `value`, of which the rank-th is one, and a tail that falls from `tail`."""
    i = torch.arange(1, SIDE + 1).double()
    first = rank - copies // 2
    return torch.where(i <= first, 2.0, torch.where(i <= first + copies, value, tail * (1 - 0.9 * i / SIDE)))


def spectra(rank):
    """{name: singular values}; of the first ones the iteration must not need an SVD."""
    i = torch.arange(1, SIDE + 1).double()
    ripple = 1 + 1e-3 * torch.sin(7 * i)
    easy = {
        "i^-0.5": i.rsqrt(),
        "i^-1": 1 / i,
        "flat": torch.ones(SIDE).double(),
        "clustered at the rank": around(rank, 6, 1.0, 0.3),
        "an outlier": torch.where(i <= 1, 1e4, 1 / i),
        "steep": torch.exp(-i),
        "of rank 3": torch.where(i <= 3, 1.0, 0.0),
        "of the rank": torch.where(i <= rank, 1.0, 0.0),
        "zero": torch.zeros(SIDE).double(),
    }
    hard = {
        "many copies": around(rank, 60, 1.0, 0.5),
        "many near copies": around(rank, 60, ripple, 0.5),
        "copies before the rank": torch.where(i <= 40, 1.0, 0.1),
        "near copies before the rank": torch.where(i <= 40, ripple, 0.1),
        "even": 1 - i / (SIDE + 1),
        "nearly flat": 1 - 1e-5 * i / SIDE,
        "logarithmic": 1 / torch.log(i + 2),
    }
    values = {name: s.sort(descending=True).values for name, s in {**easy, **hard}.items()}
    return values, set(easy)


@functools.cache
def directions(rows, columns):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.linalg.qr(torch.randn(side, SIDE, generator=generator, dtype=torch.float64)).Q for side in (rows, columns)
    )


def weight_of(s, rows=300, columns=SIDE, dtype=torch.float32):
    u, v = directions(rows, columns)
    return ((u * s) @ v.T).to(dtype)


def lacks(weight, part, rank):
    """The share of the optimal energy that W - part has kept for itself, against an SVD in float64."""
    weight, part = weight.double(), part.double()
    optimal = torch.linalg.svdvals(weight)[..., :rank].square().sum(-1)
    captured = weight.square().sum((-2, -1)) - (weight - part).square().sum((-2, -1))
    return (optimal - captured) / optimal.clamp_min(1e-300)


@pytest.mark.parametrize("rank", [4, 24])
@pytest.mark.parametrize("method", ["pissa", "pissa_fast"])
def test_the_energy_is_within_the_tolerance_whatever_the_spectrum(method, rank):
    tolerance = TOLERANCES[method]
    values, easy = spectra(rank)
    for name, s in values.items():
        weight = weight_of(s)
        found = leading_triples(weight, rank, tolerance)
        if found.converged:
            assert lacks(weight, (found.u * found.s) @ found.vh, rank) <= tolerance, name
        else:
            assert name not in easy, name
        a, b = pissa_factors(weight, rank, 0.5, method=method)
        assert lacks(weight, 0.5 * b @ a, rank) <= tolerance, name
        assert are_leading_triples(weight, a, b, 0.5, method=method), name  # or a kept start would be made at each run


@pytest.mark.parametrize(("method", "spread"), [("pissa", 1e-5), ("pissa_fast", 1e-3)])
def test_near_copies_cost_a_few_tolerances_at_most(method, spread):
    """The estimate's blind side: more values within a few tolerances of each other than a block has vectors."""
    generator = torch.Generator().manual_seed(0)
    for rank in (2, 8, 20):
        for _ in range(4):
            levels = torch.rand(4, generator=generator).double()[torch.randint(0, 4, (SIDE,), generator=generator)]
            s = levels * (1 + spread * torch.rand(SIDE, generator=generator).double())
            weight = weight_of(s.sort(descending=True).values)
            a, b = pissa_factors(weight, rank, 0.5, method=method)
            missing = lacks(weight, 0.5 * b @ a, rank)
            assert missing <= 10 * TOLERANCES[method] and missing <= 2 * spread + 1e-6
            assert are_leading_triples(weight, a, b, 0.5, method=method)


def test_factors_that_lack_the_first_triple_are_not_believed():
    weight = weight_of(spectra(16)[0]["i^-0.5"])
    a, b = pissa_factors(weight, 17, 1.0)
    for method in TOLERANCES:
        assert are_leading_triples(weight, a[:16], b[:, :16], 1.0, method=method)
        assert not are_leading_triples(weight, a[1:], b[:, 1:], 1.0, method=method)


@pytest.mark.parametrize("shape", [(300, SIDE), (SIDE, 300), (SIDE, SIDE)])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e12])
def test_any_shape_and_scale(shape, scale):
    weight = weight_of(spectra(16)[0]["i^-0.5"], *shape) * scale
    found = leading_triples(weight, 16, 1e-6)
    assert found.converged
    assert lacks(weight.double() / scale, (found.u * (found.s / scale)) @ found.vh, 16) <= 1e-6
    eye = torch.eye(16)
    torch.testing.assert_close(found.u.T @ found.u, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.vh @ found.vh.T, eye, rtol=0, atol=1e-5)


def test_float64_goes_as_far_as_it_is_asked_to():
    weight = weight_of(spectra(16)[0]["i^-1"], dtype=torch.float64)
    found = leading_triples(weight, 16, 1e-11)
    assert found.converged and lacks(weight, (found.u * found.s) @ found.vh, 16) <= 1e-11


class Products(TorchDispatchMode):
    """Counts the columns that matrices of this shape are multiplied with, batches once."""

    def __init__(self, shape):
        super().__init__()
        self.shapes, self.columns = (tuple(shape), tuple(shape)[::-1]), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and tuple(args[0].shape[-2:]) in self.shapes:
            self.columns += args[1].shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [(), (3,)])
def test_it_costs_the_products_that_it_says_and_few_of_them(batch):
    weight = weight_of(spectra(16)[0]["i^-1"]).expand(*batch, -1, -1).contiguous()
    with Products(weight.shape[-2:]) as products:
        found = leading_triples(weight, 16, 1e-6)
    assert products.columns == found.columns
    # five subspace iterations of an oversampled block would take more, and not reach the tolerance
    assert found.columns <= 2 * 5 * (16 + 16)


def test_experts_are_found_together_each_to_the_tolerance():
    values, _ = spectra(16)
    experts = torch.stack([weight_of(values[name]) for name in ("i^-0.5", "flat", "zero", "i^-1")])
    experts = experts * torch.tensor([1.0, 1e3, 1.0, 1e-8])[:, None, None]
    a, b = pissa_factors(experts, 16, 2.0)
    for weight, one_a, one_b in zip(experts, a, b, strict=True):
        assert lacks(weight, 2 * one_b @ one_a, 16) <= 1e-6
    assert are_leading_triples(experts, a, b, 2.0, method="pissa")
    alone = leading_triples(experts[3], 16, 1e-6)
    together = leading_triples(experts[2:], 16, 1e-6)
    assert together.columns >= alone.columns and together.converged.all()


def test_what_is_too_small_beside_its_rank_is_not_iterated():
    assert is_worth_it(16, SIDE, 300) and not is_worth_it(16, 300, 191) and not is_worth_it(128, 959, 4096)
