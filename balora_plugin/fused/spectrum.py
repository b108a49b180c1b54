"""Singular values of the logits matrix from hidden states, without the logits. Imports torch alone.

With G = W^T W = L L^T (d x d, once a head), sigma(H W^T) = sigma(H L): M x d instead of M x V. A bias is one more
column; centring rows of logits is centring W over the vocabulary; a scale is a factor. A softcap is not linear, and a
head that trains has another G at every step: see head_spectrum.py.
Where rows are few, P = H G gives both the Gram matrix P H^T and the gradient: one product with the head's matrix in
the place of two with L.
Gram matrices and eigenvalues are float64: a float32 Gram is 30 % off in the gradient at condition number 1e4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..regularizers import singular_value_ratio
from .factor import HeadFactor
from .precision import exact_product
from .saved_gradients import kept_dtype

_STRONG_IN_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))  # P100, V100, A100, H100 / H200, B200
_RELATIVE_ZERO = (
    1e-7  # of the largest singular value: the square root of what a float64 Gram matrix resolves, rounded up
)


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
    if hidden.ndim == 3 and (factor.has_bias or centered):
        raise ValueError("the flattened layout supports neither a head bias nor centered=True; use (M, d) rows.")
    return spectral_ratio(
        hidden,
        None,
        factor.centered if centered else factor.plain,
        gram=factor.gram(centered=centered),
        bias=factor.has_bias,
        scale=scale,
        k=k,
        norm=norm,
    ).value


def matrix_spectral_term(matrix: Tensor, *, k: int, norm: str = "nuclear") -> Tensor:
    """The same of a matrix (M, d) as it stands (`svd_input="features"`)."""
    return spectral_ratio(matrix, None, None, k=k, norm=norm).value


class SpectralRatio(NamedTuple):
    """`value`: minus the ratio, differentiable, 0 where it cannot act; `used_k` (int64): 0 there, else the k used."""

    value: Tensor
    used_k: Tensor


def spectral_ratio(
    hidden: Tensor,
    counted: Tensor | None,
    factor: Tensor | None,
    *,
    k: int,
    norm: str = "nuclear",
    gram: Tensor | None = None,
    bias: bool = False,
    scale: float = 1.0,
    clamp: bool = False,
    max_rows: int = 0,
    seed: Tensor | None = None,
) -> SpectralRatio:
    """The ratio of counted rows @ factor, as one operator whose shapes do not depend on what is counted.

    Args:
        hidden: (M, d) rows, or (B, T, d): one row a sample, positions that are not counted are zero.
        counted: (M,) or (B, T), bool; None = all.
        factor: (d', rank) of the head, see HeadFactor; None takes the rows themselves.
        gram: (d', d') factor @ factor.T; less work where the rows are fewer than `rank`.
        bias: Append the column of ones that belongs to a head bias.
        clamp: Where the matrix has no more than k rows or columns, take one less (nuclear), and give 0 for a single row
            or column instead of a constant.
        max_rows: Take at most so many rows, drawn by `seed` (0-d int64 on the CPU); 0 = all.
    """
    want = torch.is_grad_enabled() and hidden.requires_grad
    value, used_k, _ = spectral_ratio_op(
        hidden, counted, factor, gram, bias, float(scale), k, norm, clamp, max_rows, seed, want
    )
    return SpectralRatio(value, used_k)


def compute_spectral_ratio(
    hidden: Tensor,
    counted: Tensor | None,
    factor: Tensor | None,
    gram: Tensor | None,
    bias: bool,
    scale: float,
    k: int,
    norm: str,
    clamp: bool,
    max_rows: int,
    seed: Tensor | None,
    want: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minus the ratio (), the k that was used (), and the gradient by hidden (empty without `want`)."""
    flattened = hidden.ndim == 3
    precision = torch.float64 if hidden.dtype == torch.float64 else product_precision(hidden.device)
    if flattened:
        y = hidden.to(precision)
        y = y if counted is None else y.masked_fill(~counted.unsqueeze(-1), 0.0)
        index = None
    else:
        index = None if counted is None else counted.nonzero().squeeze(-1)
        rows = hidden.shape[0] if index is None else index.numel()
        if 0 < max_rows < rows:
            drawn = drawn_rows(rows, max_rows, seed).to(hidden.device)
            index = drawn if index is None else index[drawn]
        y = (hidden if index is None else hidden[index]).to(precision)
    if bias:
        y = torch.cat([y, y.new_ones(*y.shape[:-1], 1)], dim=-1)
    # P = H G would carry float32 rounding of G, the square of L: there by the factor
    few = factor is not None and not flattened and y.shape[0] <= factor.shape[1] and precision == torch.float64
    small = _by_gram(y, gram, scale) if gram is not None and few else _by_factor(y, factor, scale)
    used = usable_k(small.limit, k, norm) if clamp else k
    narrow = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    kept = kept_dtype(hidden.dtype)
    full = torch.zeros(hidden.shape if want else 0, dtype=kept, device=hidden.device)  # row by row, as the fake says
    found = _ratio_and_core(small.gram, used, norm, want) if used else None
    used_k = torch.tensor(used if found else 0, device=hidden.device)
    if found is None:
        return y.new_zeros((), dtype=narrow), used_k, full
    value, core = found
    if core is None:
        return value.to(narrow), used_k, full
    gradient = small.gradient(core)[..., : hidden.shape[-1]].to(kept)
    if flattened and counted is not None:
        gradient = gradient.masked_fill(~counted.unsqueeze(-1), 0.0)
    full = full.copy_(gradient) if index is None else full.index_copy_(0, index, gradient)
    return value.to(narrow), used_k, full


def ratio_bytes(rows: int, hidden: int, rank: int) -> int:
    """Returns the bytes that a call on `rows` rows of `hidden` columns holds at its peak, beside arguments and results.

    `rank`: columns of the head's factor; 0 without one. In float64: the rows, their product with the factor, the
    gradient; the Gram matrix of the smaller side, its eigenvectors, and the gradient's core, with work space for both.
    """
    side = min(rows, rank or hidden)
    return torch.float64.itemsize * (3 * rows * max(hidden, rank) + 4 * side * side)


def product_precision(device: torch.device) -> torch.dtype:
    """Of the products with the factor: float64, but float32 on GPUs that have next to none of it (1/32 to 1/64: A40).

    These products are the larger part of the cost. With float32 ones the ratio keeps 1e-6 at condition number 1e4.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) not in _STRONG_IN_FLOAT64:
        return torch.float32
    return torch.float64


def drawn_rows(rows: int, count: int, seed: Tensor | None) -> Tensor:
    """`count` of `rows` indices in ascending order, int64 on the CPU, the same for the same seed on every device."""
    generator = torch.Generator().manual_seed(0 if seed is None else int(seed))
    return torch.randperm(rows, generator=generator)[:count].sort().values


def usable_k(limit: int, k: int, norm: str) -> int:
    """k, or less where a matrix of `limit` singular values makes the term constant; 0 where it cannot act at all."""
    if norm != "none" and limit < 2:
        return 0
    return limit - 1 if norm == "nuclear" and k >= limit else k


spectral_ratio_op = torch.library.custom_op("balora::spectral_ratio", compute_spectral_ratio, mutates_args=())


@spectral_ratio_op.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    want = others[-1]
    narrow = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    gradient = hidden.new_empty(hidden.shape if want else 0, dtype=kept_dtype(hidden.dtype))
    return hidden.new_empty((), dtype=narrow), hidden.new_empty((), dtype=torch.int64), gradient


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.want, ctx.dtype, ctx.others = inputs[-1], inputs[0].dtype, len(inputs) - 1
    ctx.save_for_backward(output[2].detach())
    ctx.mark_non_differentiable(output[1], output[2])


@once_differentiable
def _scale_gradient(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    scaled = (gradient.to(torch.promote_types(ctx.dtype, grad.dtype)) * grad).to(ctx.dtype) if ctx.want else None
    return (scaled, *([None] * ctx.others))


spectral_ratio_op.register_autograd(_scale_gradient, setup_context=_keep_gradient)


def ratio_gradient(s: Tensor, k: int, norm: str) -> tuple[Tensor, Tensor]:
    """Minus the ratio and its derivative by each singular value: s (n,) descending -> (), (n,).

    Zero singular values get derivative zero: the ratio has a kink there and no direction is better than another.
    """
    ratio = singular_value_ratio(s, k, norm)
    gradient = torch.zeros_like(s)
    gradient[:k] = 1.0
    if norm == "nuclear":
        gradient = (gradient - ratio) / s.sum()
    elif norm == "frobenius":
        length = torch.linalg.vector_norm(s)
        gradient = (gradient - ratio * s / length) / length
    return -ratio, torch.where(s > 0, -gradient, torch.zeros_like(gradient))


class _Small(NamedTuple):
    """The Gram matrix (n, n) of the logits' smaller side in float64, how many singular values there are at most, and
    what turns a matrix C (n, n), where C @ logits is a gradient by the logits (the other side: logits @ C), into the
    gradient by the states."""

    gram: Tensor
    limit: int
    gradient: Callable[[Tensor], Tensor]


def _by_gram(y: Tensor, gram: Tensor, scale: float) -> _Small:
    """Of y (M, d'), float64, with G (d', d') and M <= rank: the gradient is C H G."""
    product = exact_product(y, gram) * scale**2
    return _Small(product @ y.T, y.shape[0], lambda core: core @ product)


def _by_factor(y: Tensor, factor: Tensor | None, scale: float) -> _Small:
    """Of y (M, d') or (B, T, d') by L (d', rank), in the dtype of y; without one, of y itself."""
    precision = y.dtype
    if factor is not None:
        y = exact_product(y, factor.to(precision))
    y = y.double() if scale == 1.0 else y.double() * scale
    rows = y.flatten(1)
    tall = rows.shape[0] > rows.shape[1]

    def gradient(core: Tensor) -> Tensor:
        by_rows = ((rows @ core) if tall else (core @ rows)).view(y.shape) * scale
        return by_rows if factor is None else exact_product(by_rows.to(precision), factor.T.to(precision))

    return _Small(rows.T @ rows if tall else rows @ rows.T, min(rows.shape), gradient)


def _ratio_and_core(gram: Tensor, k: int, norm: str, want: bool) -> tuple[Tensor, Tensor | None] | None:
    """Minus the ratio, and C = V diag(derivative / s) V^T for _Small.gradient; None for a matrix of zeros."""
    size = gram.trace().item()  # the one wait for the device
    if size == 0.0:
        return None
    if not math.isfinite(size):  # eigh would raise: the host's own guards, and ours, know what to do with NaN
        return gram.new_full((), math.nan), torch.full_like(gram, math.nan) if want else None
    s, vectors = gram_eigen(gram)
    if not want:
        return -singular_value_ratio(s, k, norm), None
    value, weights = value_and_weights(s, k, norm)
    return value, (vectors * weights) @ vectors.T


def value_and_weights(s: Tensor, k: int, norm: str) -> tuple[Tensor, Tensor]:
    """Minus the ratio (), and its derivative by each singular value over that value (n,); 0 at zeros."""
    value, gradient = ratio_gradient(s, k, norm)
    return value, torch.where(gradient != 0, gradient / s.clamp_min(torch.finfo(s.dtype).tiny), 0.0)


def gram_eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Descending singular values (n,) and vectors (n, n) from a Gram matrix (n, n)."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    s = eigenvalues.flip(0).clamp_min(0.0).sqrt()
    # what a Gram matrix of lower rank leaves of its zeros would add up in the nuclear norm
    return torch.where(s > _RELATIVE_ZERO * s[0], s, torch.zeros_like(s)), vectors.flip(1)
