"""Gradients that are taken in the forward pass and scaled in the backward pass. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 2**22  # elements


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient waits in for the host's factors (a loss scale among them): float16 would underflow before."""
    return torch.float32 if dtype == torch.float16 else dtype


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor () in `dtype`; the factor (1 / tokens, say) in its own, where bfloat16 would shrink all alike.

    In pieces: whole tensors in a wider type would cost several times the gradient, and a head's is several GB.
    """
    wide = torch.promote_types(gradient.dtype, factor.dtype)
    if wide == gradient.dtype == dtype or gradient.numel() <= PIECE:
        return (gradient.to(wide) * factor).to(dtype)
    out = torch.empty_like(gradient, dtype=dtype)
    rows = max(PIECE // max(gradient[0].numel(), 1), 1)
    for piece, target in zip(gradient.split(rows), out.split(rows), strict=True):
        target.copy_(piece.to(wide) * factor)
    return out
