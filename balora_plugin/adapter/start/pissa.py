"""The PiSSA start: the r leading singular triples of a weight, to a tolerance or exactly. Imports torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ...fused.precision import exact_products
from .subspace import is_worth_it, leading_triples

# the name of a start -> which share of the energy of the r leading triples may be missing; None: an SVD
TOLERANCES: Mapping[str, float | None] = MappingProxyType({"pissa": 1e-6, "pissa_fast": 1e-4, "pissa_exact": None})


def started_rank(rank: int, out_features: int, in_features: int) -> int:
    """Returns how many singular triples a start of this rank takes of a matrix: `rank`, or all that it has."""
    return min(rank, out_features, in_features)


def as_worked_on(weight: Tensor) -> Tensor:
    """Returns a weight in float32 (float64 where it is), on its device, or on the CPU where that has no float64."""
    w = weight.detach()
    w = w.cpu() if w.device.type == "mps" else w
    return w if w.dtype == torch.float64 else w.float()


def pissa_factors(weight: Tensor, rank: int, scaling: float, *, method: str = "pissa") -> tuple[Tensor, Tensor]:
    """Returns A0 (k, in), B0 (out, k): scaling * B0 @ A0 is the best rank-r part of weight (out, in).

    PiSSA, eq. 2-3. k is [`started_rank`]: r, or all of a matrix that has fewer singular triples. The best part is the
    one of the largest energy, the sum of its squared singular values; `method` says how near to it: "pissa" holds at
    least 1 - 1e-6 of it, "pissa_fast" 1 - 1e-4, "pissa_exact" is LAPACK's SVD. A matrix that is small beside the rank,
    or whose iteration does not converge, gets the SVD whatever the method.

    Works in float32 (float64 for a float64 weight), whatever the weight's dtype, and whatever a user allows products to
    be rounded to (TF32). `weight` may carry leading batch dimensions (experts), which are worked on together.

    Raises:
        ValueError: rank < 1, NaN or inf in the weight or in what comes out of it, scaling not positive.
    """
    w = as_worked_on(weight)
    if rank < 1:
        raise ValueError(f"r={rank} must be >= 1.")
    if not scaling > 0:
        raise ValueError(f"the scaling lora_alpha / r is {scaling}: write lora_alpha > 0.")
    if not bool(torch.isfinite(w).all()):
        raise ValueError("the base weight holds NaN or inf: check the base model's files.")
    rank = started_rank(rank, *w.shape[-2:])
    try:
        with exact_products(w):
            u, s, vh = _triples(w, rank, TOLERANCES[method])
    except torch.linalg.LinAlgError:
        raise ValueError(_beyond(w)) from None
    root = (s / scaling).sqrt()
    a = root[..., :, None] * vh
    b = u * root[..., None, :]
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(_beyond(w))
    return a.contiguous().to(weight.device), b.contiguous().to(weight.device)


def _beyond(w: Tensor) -> str:
    return (
        f"no finite singular vectors of the base weight, whose largest magnitude is {float(w.abs().max()):.3g}: check "
        "the base model's files (weights stay below a thousand)."
    )


def _triples(w: Tensor, rank: int, tolerance: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U (..., out, r), S (..., r), V^T (..., r, in) of (..., out, in)."""
    if tolerance is None or not is_worth_it(rank, *w.shape[-2:]):
        return _exact(w, rank)
    found = leading_triples(w, rank, tolerance)
    u, s, vh = found.u, found.s, found.vh
    missed = ~found.converged
    if bool(missed.any()):
        u[missed], s[missed], vh[missed] = _exact(w[missed], rank)
    return u, s, vh


def _exact(w: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]
