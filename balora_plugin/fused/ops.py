"""The fused terms as torch.library operators: opaque to torch.compile, so that they never break a graph.

An operator's forward pass takes the gradients as well; its backward pass scales them. Imports torch alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunk import Weights, token_chunk
from .project import Projection, block_rows
from .top import TopLogProbs

IGNORED = -100
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
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums (6,): loss, task, consistency, -H_k, H, top-1 hits; and the loss's gradients by hidden, weight, bias.

    hidden, teacher_hidden (M, d), weight, teacher_weight (V, d), biases (V,), labels (M,) with -100 = not counted;
    top_*: a TopLogProbs (M, K), (M, K), (M,) in the place of teacher_hidden; lambdas (3,) float64 on the CPU: a tensor,
    because a schedule's floats would make a compiler specialise on each. `dtype` is that of the products. `wants` says
    which gradients to take; the others come back empty.
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
    block = block_rows(vocabulary, chunk_size, hidden.device.type)
    logits = [
        torch.empty(chunk_size, vocabulary, dtype=wide, device=hidden.device)
        for _ in range(1 if teacher_hidden is None else 2)
    ]
    scratch: dict[int, Tensor] = {}

    def pool(index: int, rows: int) -> Tensor:
        if index not in scratch:
            scratch[index] = torch.empty(block, vocabulary, dtype=wide, device=hidden.device)
        return scratch[index][:rows]

    head = Projection(weight, bias, scale, softcap, dtype, wide)
    teacher_head = (
        head if teacher_weight is None else Projection(teacher_weight, teacher_bias, scale, softcap, dtype, wide)
    )
    sums = torch.zeros(6, dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if wants[0] else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else weight.new_empty(0, dtype=wide)
    grad_bias = torch.zeros(vocabulary if wants[2] else 0, dtype=wide, device=hidden.device)
    for start in range(0, rows, chunk_size):
        part = slice(start, min(start + chunk_size, rows))
        h = hidden[part].to(dtype)
        z = head.logits(h, logits[0][: h.shape[0]])
        z_t = (
            None
            if teacher_hidden is None
            else teacher_head.logits(teacher_hidden[part].to(dtype), logits[1][: h.shape[0]])
        )
        for first in range(0, h.shape[0], block):
            inner = slice(first, first + block)
            size = z[inner].shape[0]
            slope = head.slope(z[inner], pool(SLOPE, size)) if differentiate and softcap is not None else None
            values = token_chunk(
                z[inner],
                None if z_t is None else z_t[inner],
                labels[part][inner],
                weights,
                form=form,
                temperature=temperature,
                top_k=top_k,
                differentiate=differentiate,
                pool=partial(pool, rows=size),
                teacher_top=None if top is None else TopLogProbs(*(x[part][inner] for x in top)),
            )
            if slope is not None:
                z[inner].mul_(slope)
            sums[1:] += values
        if not differentiate:
            continue
        if wants[2]:
            grad_bias += z.sum(dim=0) * scale
        gradient = z.to(dtype)
        if wants[0]:
            head.into_hidden(gradient, grad_hidden[part])
        if wants[1]:
            head.into_weight(gradient, h, grad_weight)
    sums[0] = weights.task * sums[1] + weights.consistency * sums[2] + weights.diversity * sums[3]
    if wants[0] and not everything:
        grad_hidden = torch.zeros_like(hidden_all).index_copy_(0, counted, grad_hidden)
    return sums, grad_hidden, grad_weight, grad_bias


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
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(6, dtype=wide),
        torch.empty_like(hidden) if wants[0] else hidden.new_empty(0),
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
    # the factor (1 / tokens, say) stays in its own precision: in bfloat16 it would shrink every gradient alike
    factor = grad_sums[0]
    grads = [
        (g.to(torch.promote_types(g.dtype, factor.dtype)) * factor).to(dtype) if want else None
        for g, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
    ]
    return (*grads, *([None] * 16))


token_terms_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)
