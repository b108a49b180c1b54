"""The fused terms as torch.library operators: opaque to torch.compile, so that they never break a graph.

An operator's forward pass takes the gradients as well; its backward pass scales them. Imports torch alone.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunk import Weights, compiled_chunk, in_base_2, token_chunk
from .project import Projection, block_rows
from .saved_gradients import kept_dtype, scaled
from .top import TopLogProbs

IGNORED = -100
LOG_2 = math.log(2.0)
SLOPE = 5  # the scratch buffer that no form of the terms uses


def compute_token_terms(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    top_ids: Tensor | None,
    top_log_probs: Tensor | None,
    top_log_tail: Tensor | None,
    lambdas: Tensor,
    form: str,
    temperature: float,
    top_k: int,
    scale: float,
    softcap: float | None,
    chunk_size: int,
    dtype: torch.dtype,
    compiled: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums (6,): loss, task, consistency, -H_k, H, top-1 hits; and the loss's gradients by hidden, weight, bias.

    hidden, teacher_hidden (M, d), weight, teacher_weight (V, d), biases (V,), labels (M,) with -100 = not counted;
    top_*: a TopLogProbs (M, K), (M, K), (M,) in the place of teacher_hidden; lambdas (3,) float64 on the CPU: a tensor,
    because a schedule's floats would make a compiler specialise on each. `dtype` is that of the products; `compiled`:
    the passes over whole blocks of logits run as compiled loops. `wants` says which gradients to take; the others come
    back empty. That by float16 hidden states is float32: it is scaled later.
    """
    differentiate = any(wants)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weights = Weights(*lambdas.tolist())
    counted = (labels != IGNORED).nonzero().squeeze(-1)  # before any product
    everything = counted.numel() == labels.numel()
    top: TopLogProbs | None = None
    if top_ids is not None and top_log_probs is not None and top_log_tail is not None:
        top = TopLogProbs(top_ids, top_log_probs, top_log_tail)
    if not everything:
        hidden_all, hidden, labels = hidden, hidden[counted], labels[counted]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[counted]
        top = None if top is None else TopLogProbs(*(x[counted] for x in top))
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    chunk_size = min(chunk_size, max(rows, 1))
    device = hidden.device
    logits = torch.empty(
        chunk_size if teacher_hidden is None else 2 * chunk_size, vocabulary, dtype=wide, device=device
    )
    small = min(chunk_size, block_rows(vocabulary, device.type))
    large = block_rows(vocabulary, device.type, compiled=True) if compiled and top is None else 0
    fast = compiled_chunk(form, temperature, top_k, differentiate, bool(weights.diversity)) if large else None
    scratch: dict[int, Tensor] = {}

    def pool(index: int, rows: int) -> Tensor:
        if index not in scratch:
            size = max(small, large) if index == SLOPE else small
            scratch[index] = torch.empty(size, vocabulary, dtype=wide, device=device)
        return scratch[index][:rows]

    numbers = lambdas.to(device, wide, non_blocking=True) if large else lambdas

    base_2 = device.type == "cpu" and dtype == wide and not large and top is None
    unit = LOG_2 if base_2 and in_base_2(form, temperature, top_k, vocabulary) else 1.0
    head = Projection(weight, bias, scale, softcap, dtype, wide, unit)
    teacher_head = head
    if teacher_weight is not None and not (_same(weight, teacher_weight) and _same(bias, teacher_bias)):
        teacher_head = Projection(teacher_weight, teacher_bias, scale, softcap, dtype, wide, unit)
    grad_hidden = torch.empty_like(hidden, dtype=kept_dtype(hidden.dtype)) if wants[0] else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else weight.new_empty(0, dtype=wide)
    grad_bias = torch.zeros(vocabulary if wants[2] else 0, dtype=wide, device=device)
    terms = [torch.zeros(0, 5, dtype=wide, device=device)]
    for start in range(0, rows, chunk_size):
        part = slice(start, min(start + chunk_size, rows))
        h, target = hidden[part].to(dtype), labels[part]
        size = h.shape[0]
        z, z_t = logits[:size], None
        if teacher_hidden is None:
            head.logits(h, z)
        else:
            h_t, z_t = teacher_hidden[part].to(dtype), logits[size : 2 * size]
            if teacher_head is head:  # one product, so that the head is read once
                head.logits(torch.cat([h, h_t]), logits[: 2 * size])
            else:
                head.logits(h, z)
                teacher_head.logits(h_t, z_t)
        slopes = None  # of the cap at the labels
        if differentiate and softcap is not None:
            slopes = head.slope(z.gather(1, target.unsqueeze(1)))
        first = 0
        while first < size:
            whole = fast is not None and first + large <= size  # one shape alone is compiled
            inner = slice(first, first + (large if whole else small))
            first = inner.stop
            z_i, z_t_i, target_i = z[inner], None if z_t is None else z_t[inner], target[inner]
            slope = None if slopes is None else head.slope(z_i, pool(SLOPE, z_i.shape[0]))
            if whole:
                assert fast is not None
                terms.append(fast(z_i, z_t_i, target_i, numbers))
            else:
                terms.append(
                    token_chunk(
                        z_i,
                        z_t_i,
                        target_i,
                        weights,
                        form=form,
                        temperature=temperature,
                        top_k=top_k,
                        differentiate=differentiate,
                        pool=partial(pool, rows=z_i.shape[0]),
                        teacher_top=None if top is None else TopLogProbs(*(x[part][inner] for x in top)),
                        unit=unit,
                    )
                )
            if slope is not None:
                z_i.mul_(slope)
        if not differentiate:
            continue
        if weights.task:
            at_labels = torch.full_like(target, -weights.task, dtype=wide).unsqueeze(1)
            z.scatter_add_(1, target.unsqueeze(1), at_labels if slopes is None else at_labels * slopes)
        if wants[2]:
            grad_bias += z.sum(dim=0) * scale
        gradient, lift = head.narrowed(z)
        if wants[0]:
            head.into_hidden(gradient, lift, grad_hidden[part])
        if wants[1]:
            head.into_weight(gradient, lift, h, grad_weight)
    sums = torch.cat([torch.zeros(1, dtype=wide, device=device), torch.cat(terms).sum(dim=0)])
    sums[1:5] *= unit
    sums[0] = weights.task * sums[1] + weights.consistency * sums[2] + weights.diversity * sums[3]
    if wants[0] and not everything:
        grad_hidden = torch.zeros_like(hidden_all, dtype=grad_hidden.dtype).index_copy_(0, counted, grad_hidden)
    return sums, grad_hidden, grad_weight, grad_bias


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two heads are one, under two names."""
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


token_terms_op = torch.library.custom_op("balora::token_terms", compute_token_terms, mutates_args=())


@token_terms_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    top_ids: Tensor | None,
    top_log_probs: Tensor | None,
    top_log_tail: Tensor | None,
    lambdas: Tensor,
    form: str,
    temperature: float,
    top_k: int,
    scale: float,
    softcap: float | None,
    chunk_size: int,
    dtype: torch.dtype,
    compiled: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(6, dtype=wide),
        torch.empty_like(hidden, dtype=kept_dtype(hidden.dtype)) if wants[0] else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if wants[1] else weight.new_empty(0, dtype=wide),
        hidden.new_empty(weight.shape[0] if wants[2] else 0, dtype=wide),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    wants = inputs[-1]
    ctx.wants = wants
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*(g.detach() for g in output[1:]))
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _scale_gradients(ctx: Any, grad_sums: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    factor = grad_sums[0]
    grads = [
        scaled(g, factor, dtype) if want else None
        for g, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
    ]
    return (*grads, *([None] * 17))


token_terms_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)
