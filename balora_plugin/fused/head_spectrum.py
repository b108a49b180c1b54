"""The spectrum where no factor of the head exists: a softcap, or a head that trains. Imports torch alone.

Z Z^T is accumulated over chunks of the vocabulary, which is exact too and also gives the head's own gradient. The
products with the vocabulary have the precision of spectrum.py's with the factor; Z Z^T itself is float64 everywhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..regularizers import singular_value_ratio
from . import spectrum
from .head import Head
from .precision import exact_product
from .saved_gradients import scaled
from .spectrum import gram_eigen, value_and_weights


def head_spectral_term(
    hidden: Tensor,
    weight: Tensor,
    *,
    k: int,
    norm: str = "nuclear",
    centered: bool = False,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int = 4096,
) -> Tensor:
    """[`spectral_term`] without a factor: Z Z^T over chunks of `chunk_size` vocabulary columns, two passes.

    For a softcapped head, where no factor exists, and for a head that trains: the gradient reaches hidden (M, d),
    weight (V, d) and bias (V,). Costs O(M (M + d) V) instead of O(M d^2): 4 M^2 V + 6 M d V FLOP, of them 2 M^2 V in
    float64 on every device, and 2 M d V more for a weight that trains, whose gradient is kept in float32.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        options = _Options(k, norm, centered, scale, softcap, chunk_size, torch.is_grad_enabled())
        value = _HeadRatio.apply(hidden, weight, bias, options)
    return value.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)


def head_ratio_bytes(rows: int, head: Head, chunk_size: int = 4096) -> int:
    """Returns the bytes that a call on `rows` rows holds at its peak, beside its arguments, with products in float64.

    Of a chunk's logits six like matrices at a time with a softcap (and two more of the chunk before), four without;
    Z Z^T, its eigenvectors and the gradient's core; the rows and their gradient.
    """
    vocabulary, size = head.weight.shape
    columns = min(vocabulary, chunk_size)
    matrices = (8 if vocabulary > chunk_size else 6) if head.softcap else 4
    elements = matrices * rows * columns + columns * size + 3 * rows * rows + 2 * rows * size
    return torch.float64.itemsize * elements


class _Options(NamedTuple):
    k: int
    norm: str
    centered: bool
    scale: float
    softcap: float | None
    chunk_size: int
    differentiate: bool


class _HeadRatio(torch.autograd.Function):
    """The ratio and its gradients, taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
        k, norm, centered, scale, softcap, chunk_size, differentiate = options
        double = torch.float64 in (hidden.dtype, weight.dtype)
        precision = torch.float64 if double else spectrum.product_precision(hidden.device)
        h = hidden.to(precision)
        m, vocabulary = h.shape[0], weight.shape[0]
        wants = [differentiate and needed for needed in ctx.needs_input_grad[:3]]

        def chunk(part: slice) -> tuple[Tensor, Tensor | float]:
            """(M, C) logits of one vocabulary chunk and their derivative by hidden @ W^T."""
            z = exact_product(h, weight[part].to(precision).T)
            if bias is not None:
                z = z + bias[part].to(precision)
            z = z * scale
            if softcap is None:
                return z, scale
            tanh = torch.tanh(z / softcap)
            return softcap * tanh, scale * (1.0 - tanh.square())

        parts = [slice(start, start + chunk_size) for start in range(0, vocabulary, chunk_size)]
        gram = h.new_zeros(m, m, dtype=torch.float64)
        total = h.new_zeros(m, dtype=torch.float64)
        for part in parts:
            z = chunk(part)[0].double()
            gram += z @ z.T
            total += z.sum(dim=1)
        mean = total / vocabulary if centered else torch.zeros_like(total)
        gram -= vocabulary * torch.outer(mean, mean)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        grad_hidden = torch.zeros_like(h, dtype=torch.float64) if wants[0] else None
        grad_weight, grad_bias = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if x is not None and want else None
            for x, want in zip((weight, bias), wants[1:], strict=True)
        )
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        size = gram.trace().item()
        if size == 0.0:  # no rows, or logits of zero: 0 with a gradient of 0
            return gram.new_zeros(())
        if math.isfinite(size):
            s, vectors = gram_eigen(gram)
            if not differentiate:
                return -singular_value_ratio(s, k, norm)
            value, weights = value_and_weights(s, k, norm)
            core = ((vectors * weights) @ vectors.T).to(precision)  # d value / dZ = core @ (Z - mean)
        else:  # eigh would raise: see _ratio_and_core
            value, core = gram.new_full((), math.nan), h.new_full((m, m), math.nan)
        offset = mean.to(precision).unsqueeze(1)
        for part in parts if any(wants) else ():
            z, slope = chunk(part)
            inner = exact_product(core, z - offset) * slope
            if grad_hidden is not None:
                grad_hidden += exact_product(inner, weight[part].to(precision))
            if grad_weight is not None:
                grad_weight[part] = exact_product(inner.T, h)
            if grad_bias is not None:
                grad_bias[part] = inner.sum(dim=0)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if kept is None else scaled(kept, grad.to(kept.dtype), dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None)
