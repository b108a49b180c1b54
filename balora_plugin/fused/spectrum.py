"""Singular values of the logits matrix from hidden states, without the logits. Imports torch alone.

With G = W^T W = L L^T (d x d, once a head), sigma(H W^T) = sigma(H L): M x d instead of M x V. A bias is one more
column; centring rows of logits is centring W over the vocabulary; a scale is a factor. A softcap is not linear: there
Z Z^T is accumulated over chunks of the vocabulary, which is exact too and also gives the head's own gradient.
Gram matrices and eigenvalues are float64: a float32 Gram is 30 % off in the gradient at condition number 1e4.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..regularizers import singular_value_ratio

_RELATIVE_ZERO = (
    1e-7  # of the largest singular value: the square root of what a float64 Gram matrix resolves, rounded up
)


class HeadFactor:
    """L with L L^T = W^T W of an LM head W (V, d), plain or row-centred, (d', rank); d' = d, + 1 with a bias."""

    def __init__(self, gram: Tensor, mean: Tensor, vocabulary: int, has_bias: bool) -> None:
        self._gram, self._mean = gram, mean
        self.vocabulary = vocabulary
        self.has_bias = has_bias

    @cached_property
    def plain(self) -> Tensor:
        """(d', rank) L of the logits as they are."""
        return _square_root(self._gram)

    @cached_property
    def centered(self) -> Tensor:
        """(d', rank) L of the row-centred logits."""
        return _square_root(self._gram - self.vocabulary * torch.outer(self._mean, self._mean))

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None, *, chunk_size: int = 16384) -> HeadFactor:
        """weight (V, d), bias (V,) or None -> factor. Reads W in chunks of `chunk_size` rows; takes no gradient."""
        vocabulary, d = weight.shape
        size = d + (bias is not None)
        gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
        total = torch.zeros(size, dtype=torch.float64, device=weight.device)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            for start in range(0, vocabulary, chunk_size):
                part = weight[start : start + chunk_size].double()
                if bias is not None:
                    part = torch.cat([part, bias[start : start + chunk_size, None].double()], dim=1)
                gram += part.T @ part
                total += part.sum(dim=0)
        return cls(gram, total / vocabulary, vocabulary, bias is not None)


def spectral_term(
    hidden: Tensor, factor: HeadFactor, *, k: int, norm: str = "nuclear", centered: bool = False, scale: float = 1.0
) -> Tensor:
    """Minus the ratio of the k largest singular values of the logits hidden @ W^T (+ bias), differentiable in hidden.

    Args:
        hidden: (M, d), or (B, T, d) for the flattened layout: one row a sample, B x (T * V); zero the positions that
            are not counted (a head bias is then not supported: a masked position would still carry it).
        factor: Of the head, see [`HeadFactor.from_weight`].
        k, norm, centered: As in [`regularizers.spectral`][balora_plugin.regularizers.spectral].
        scale: Factor on the logits; matters for norm="none" only.

    Returns: scalar, float32 (float64 for float64 hidden).

    >>> weight = torch.eye(5)
    >>> hidden = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0]))
    >>> spectral_term(hidden, HeadFactor.from_weight(weight), k=2).item()  # -(3 + 2) / 6
    -0.833...
    """
    flattened = hidden.ndim == 3
    if flattened and (factor.has_bias or centered):
        raise ValueError("the flattened layout supports neither a head bias nor centered=True; use (M, d) rows.")
    with torch.autocast(hidden.device.type, enabled=False):
        y = hidden.double()
        if factor.has_bias:
            y = torch.cat([y, y.new_ones(y.shape[0], 1)], dim=1)
        y = y @ (factor.centered if centered else factor.plain) * scale
        if flattened:
            y = y.flatten(1)
        value = _MatrixRatio.apply(y, k, norm, torch.is_grad_enabled())
    return value.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)


def matrix_spectral_term(matrix: Tensor, *, k: int, norm: str = "nuclear") -> Tensor:
    """The same of a matrix (M, d) as it stands (`svd_input="features"`)."""
    with torch.autocast(matrix.device.type, enabled=False):
        value = _MatrixRatio.apply(matrix.double(), k, norm, torch.is_grad_enabled())
    return value.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)


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
    weight (V, d) and bias (V,). Costs O(M^2 V) instead of O(M d^2).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        options = (k, norm, centered, scale, softcap, chunk_size, torch.is_grad_enabled())
        value = _HeadRatio.apply(hidden, weight, bias, *options)
    return value.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)


def ratio_gradient(s: Tensor, k: int, norm: str) -> tuple[Tensor, Tensor]:
    """Minus the ratio and its derivative by each singular value: s (n,) descending -> (), (n,).

    Zero singular values get derivative zero: the ratio has a kink there and no direction is better than another.
    """
    with torch.enable_grad():
        leaf = s.detach().requires_grad_()
        value = -singular_value_ratio(leaf, k, norm)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), torch.where(s > 0, gradient, torch.zeros_like(gradient))


class _MatrixRatio(torch.autograd.Function):
    """Minus the singular-value ratio of a float64 matrix, by the Gram matrix of its smaller side."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, k: int, norm: str, differentiate: bool) -> Tensor:
        if y.numel() == 0 or not bool(y.any()):
            ctx.save_for_backward(torch.zeros_like(y))
            return y.new_zeros(())
        tall = y.shape[0] > y.shape[1]
        s, vectors = _gram_eigen(y.T @ y if tall else y @ y.T)
        if not differentiate:  # inside forward gradients are always off: the caller looked
            return -singular_value_ratio(s, k, norm)
        value, gradient = ratio_gradient(s, k, norm)
        weights = torch.where(gradient != 0, gradient / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
        ctx.save_for_backward((y @ vectors) * weights @ vectors.T if tall else (vectors * weights) @ (vectors.T @ y))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


class _HeadRatio(torch.autograd.Function):
    """The same from hidden states and a head that may be softcapped or training."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        norm: str,
        centered: bool,
        scale: float,
        softcap: float | None,
        chunk_size: int,
        differentiate: bool,
    ) -> Tensor:
        h = hidden.double()
        m, vocabulary = h.shape[0], weight.shape[0]
        wants = ctx.needs_input_grad[:3]

        def chunk(start: int) -> tuple[Tensor, Tensor]:
            """(M, C) logits of one vocabulary chunk and their derivative by hidden @ W^T."""
            part = slice(start, start + chunk_size)
            z = h @ weight[part].double().T
            if bias is not None:
                z = z + bias[part].double()
            z = z * scale
            if softcap is None:
                return z, torch.full_like(z, scale)
            tanh = torch.tanh(z / softcap)
            return softcap * tanh, scale * (1.0 - tanh.square())

        gram = h.new_zeros(m, m)
        total = h.new_zeros(m)
        for start in range(0, vocabulary, chunk_size):
            z, _ = chunk(start)
            gram += z @ z.T
            total += z.sum(dim=1)
        mean = total / vocabulary if centered else torch.zeros_like(total)
        gram -= vocabulary * torch.outer(mean, mean)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        grad_hidden = torch.zeros_like(h)
        grad_weight = torch.zeros_like(weight, dtype=h.dtype) if wants[1] else None
        grad_bias = torch.zeros_like(bias, dtype=h.dtype) if bias is not None and wants[2] else None
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        if not bool(gram.any()):  # no rows, or logits of zero: 0 with a gradient of 0
            return h.new_zeros(())
        s, vectors = _gram_eigen(gram)
        if not differentiate:
            return -singular_value_ratio(s, k, norm)
        value, gradient = ratio_gradient(s, k, norm)
        weights = torch.where(gradient != 0, gradient / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)
        core = (vectors * weights) @ vectors.T  # d value / dZ = core @ (Z - mean)
        for start in range(0, vocabulary, chunk_size):
            part = slice(start, start + chunk_size)
            z, slope = chunk(start)
            inner = core @ (z - mean[:, None]) * slope
            grad_hidden += inner @ weight[part].double()
            if grad_weight is not None:
                grad_weight[part] = inner.T @ h
            if grad_bias is not None:
                grad_bias[part] = inner.sum(dim=0)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if g is None else (g * grad).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, *([None] * 7))


def _gram_eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Descending singular values (n,) and vectors (n, n) from a Gram matrix (n, n)."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    s = eigenvalues.flip(0).clamp_min(0.0).sqrt()
    # what a Gram matrix of lower rank leaves of its zeros would add up in the nuclear norm
    return torch.where(s > _RELATIVE_ZERO * s[0], s, torch.zeros_like(s)), vectors.flip(1)


def _square_root(gram: Tensor) -> Tensor:
    """L with L L^T = gram, columns of zero dropped: eigenvectors, because a centred or small head is rank-deficient."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    keep = eigenvalues > eigenvalues[-1].clamp_min(0.0) * 1e-14
    return vectors[:, keep] * eigenvalues[keep].sqrt()
