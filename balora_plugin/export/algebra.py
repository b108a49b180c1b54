"""The algebra of low-rank updates: singular values, truncation and errors from the factors alone. Imports torch alone.

An update is scaling * B A with A (r, in) and B (out, r), or a stack of such products: A (..., r, in), B (..., out, r).
The product (out, in) is never formed: with B = Q R and A^T = P S, the singular values of B A are those of R S^T, which
is (r, r). Everything is computed in float64, whatever the factors' dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def update_norm(a: Tensor, b: Tensor, scaling: float = 1.0) -> float:
    """Returns the Frobenius norm of scaling * B A, over all matrices of a stack."""
    return abs(scaling) * float(torch.linalg.matrix_norm(_core(a, b)).norm())


def update_distance(
    a: Tensor, b: Tensor, scaling: float, other_a: Tensor, other_b: Tensor, other_scaling: float
) -> float:
    """Returns the Frobenius norm of scaling * B A - other_scaling * B' A'; the ranks may differ."""
    stacked_a = torch.cat([a.double(), other_a.double()], dim=-2)
    stacked_b = torch.cat([scaling * b.double(), -other_scaling * other_b.double()], dim=-1)
    return update_norm(stacked_a, stacked_b)


def singular_values(a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
    """Returns the singular values of scaling * B A that can be non-zero, falling: (..., min(r, in, out)) float64."""
    return abs(scaling) * torch.linalg.svdvals(_core(a, b))


def truncate(a: Tensor, b: Tensor, rank: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the best update of this rank: A' (..., rank, in), B' (..., out, rank), float64, with the scaling inside.

    B' = U sqrt(S), A' = sqrt(S) V^T: nothing cancels, so a cast to bfloat16 costs its rounding and no more. Rows beyond
    the update's own rank are zero.

    Raises:
        ValueError: rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be >= 1.")
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().mT)
    u, s, vh = torch.linalg.svd(scaling * (r_b @ r_a.mT), full_matrices=False)
    root = s[..., :rank].sqrt()
    new_b = q_b @ (u[..., :, :rank] * root[..., None, :])
    new_a = (root[..., :, None] * vh[..., :rank, :]) @ q_a.mT
    return pad_rank(new_a, new_b, rank)


def pad_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns the same update at a higher rank, filled up with zeros."""
    missing = rank - a.shape[-2]
    if missing <= 0:
        return a, b
    a = torch.cat([a, a.new_zeros(*a.shape[:-2], missing, a.shape[-1])], dim=-2)
    return a, torch.cat([b, b.new_zeros(*b.shape[:-1], missing)], dim=-1)


def smallest_rank(spectra: list[Tensor], max_error: float) -> int:
    """Returns the smallest rank for all updates together that loses at most `max_error` of their joint norm.

    `spectra`: [`singular_values`] of each. The error is sqrt(sum of the squares left out / sum of all squares).

    Raises:
        ValueError: max_error is not between 0 and 1.
    """
    if not 0.0 < max_error < 1.0:
        raise ValueError(f"max_error={max_error!r} must be a number between 0 and 1, such as 0.01.")
    longest = max((s.shape[-1] for s in spectra), default=1)
    squares = torch.zeros(longest, dtype=torch.float64)
    for s in spectra:
        squares[: s.shape[-1]] += s.double().square().reshape(-1, s.shape[-1]).sum(0).cpu()
    # tails[k]: what is left out at rank k; summed from the small end, where the precision is needed
    tails = torch.cat([squares.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    enough = tails <= max_error**2 * tails[0]
    return max(1, int(torch.nonzero(enough)[0]))


def relative(error: float, norm: float) -> float:
    """Returns error / norm, and 0 for an update that is zero itself."""
    return error / norm if norm > 0.0 else (0.0 if error == 0.0 else math.inf)


def by_expert(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Takes a stack out of PEFT's layout: (E r, in) and (out, r E) -> (E, r, in), (E, out, r)."""
    return a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)


def from_experts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Puts a stack into PEFT's layout: (E, r, in), (E, out, r) -> (E r, in) and (out, r E)."""
    return a.reshape(-1, a.shape[-1]).contiguous(), b.permute(1, 2, 0).reshape(b.shape[1], -1).contiguous()


def _core(a: Tensor, b: Tensor) -> Tensor:
    """Returns a small matrix with the singular values of B A: (..., min(out, r), min(in, r)) float64."""
    r_b = torch.linalg.qr(b.double(), mode="r").R
    r_a = torch.linalg.qr(a.double().mT, mode="r").R
    return r_b @ r_a.mT
