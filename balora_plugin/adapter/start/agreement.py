"""Whether factors are the leading singular triples of a weight: cheap to ask, where finding them is not."""

from __future__ import annotations

import torch
from torch import Tensor

from ...fused.precision import exact_products
from .pissa import TOLERANCES, as_worked_on
from .subspace import largest_entry

TOLERANCE = 1e-3  # of the weight's norm and of a triple's own length
ABOVE = 1.01  # how far what is left may rise above the last triple: both are found to some digits
_PROBES = 8
_STEPS = 4


@torch.no_grad()
def are_leading_triples(weight: Tensor, a: Tensor, b: Tensor, scaling: float, *, method: str) -> bool:
    """Returns whether A0 (r, in) and B0 (out, r) are what `pissa_factors` makes of `weight` (out, in) by `method`.

    With W = U S V^T and D = S / scaling they are B0 = U sqrt(D) and A0 = sqrt(D) V^T. So

    1. B0^T B0 = A0 A0^T = D, a diagonal matrix: entry i, j within TOLERANCE of sqrt(D_i D_j);
    2. B0^T W = scaling D A0: row i within TOLERANCE of |W| sqrt(D_i), |.| the Frobenius norm;
    3. what is left, W - scaling B0 A0, stretches no vector by more than S_r, or by what the method's tolerance allows:
       with t of the sum E of the S_i^2 missing, the triple in S_r's place has at most S_r^2 + t E.

    In float32 1 and 2 hold to 1e-5 whatever the spectrum, of an iteration too (its V and S are those of U^T W);
    the factors of another matrix of n rows miss 2 by about 1 / sqrt(n). For 3 a few random vectors are stretched a few
    times, which can only underestimate. Leading dimensions (experts) are taken one by one. Costs r + 2 * _STEPS *
    _PROBES products of W with a vector.
    """
    w = as_worked_on(weight)
    with exact_products(w):
        return _agree(w, a.to(w), b.to(w), scaling, TOLERANCES[method] or 0.0)


def _agree(w: Tensor, a: Tensor, b: Tensor, scaling: float, missing: float) -> bool:
    """Tells the same of a weight as it is worked on, of whose energy a part `missing` may be."""
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return False
    largest = largest_entry(w)
    w, a, b = w / largest, a / largest.sqrt(), b / largest.sqrt()  # else squares of small weights are 0
    size = w.flatten(-2).norm(dim=-1)[..., None]
    of_a, of_b = a.double() @ a.double().mT, b.double().mT @ b.double()
    d = of_b.diagonal(dim1=-2, dim2=-1)
    root = d.sqrt()
    between = TOLERANCE * root[..., :, None] * root[..., None, :]
    diagonal = torch.diag_embed(d)
    if bool(((of_b - diagonal).abs() > between).any() or ((of_a - diagonal).abs() > between).any()):
        return False
    apart = (b.mT @ w - scaling * d[..., :, None].to(w) * a).double().norm(dim=-1)
    if bool((apart > TOLERANCE * size.double() * root).any()):
        return False
    s = scaling * d
    lost = missing * s.square().sum(dim=-1)
    allowed = ((ABOVE * s.amin(dim=-1)).square() + lost).sqrt() + TOLERANCE * s.amax(dim=-1)
    return bool((_stretch(w, a, b, scaling).double() <= allowed).all())


def _stretch(w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns by how much W - scaling B0 A0 stretches a vector: an estimate from below."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(*w.shape[:-2], _PROBES, w.shape[-1], generator=generator, dtype=w.dtype).to(w.device)
    found = x.new_zeros(w.shape[:-2])
    tiny = torch.finfo(w.dtype).tiny
    for _ in range(_STEPS):  # in rows: BLAS is many times slower with a few columns
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(tiny)
        y = x @ w.mT - scaling * (x @ a.mT) @ b.mT
        stretched = y.norm(dim=-1, keepdim=True)
        found = torch.maximum(found, stretched.flatten(-2).amax(dim=-1))
        y = y / stretched.clamp_min(tiny)
        x = y @ w - scaling * (y @ b) @ a
    return found
