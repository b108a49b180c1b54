"""Task loss, consistency and entropy of counted tokens in one pass over chunks of rows. Imports torch alone.

The gradient with respect to the hidden states (and the head, where it trains) is taken chunk by chunk in the forward
pass, so only one chunk's logits exist at a time and nothing is recomputed in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..regularizers import consistency_rows, entropy_rows
from .project import default_chunk, project


@dataclass(frozen=True)
class TokenTerms:
    """What [`token_terms`] returns: sums over counted tokens, 0-d tensors.

    `loss` = task + lambda_consistency * consistency - lambda_diversity * (entropy over top_k), differentiable. The rest
    is detached and unweighted: `task` (nats), `consistency`, `diversity` (minus the entropy over top_k), `entropy`
    (full vocabulary), `correct` (top-1 hits), `count`.
    """

    loss: Tensor
    task: Tensor
    consistency: Tensor
    diversity: Tensor
    entropy: Tensor
    correct: Tensor
    count: Tensor


class _Options(NamedTuple):
    lambda_task: float
    lambda_consistency: float
    lambda_diversity: float
    form: str
    temperature: float
    top_k: int
    scale: float
    softcap: float | None
    chunk_size: int
    differentiate: bool


def token_terms(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    *,
    lambda_consistency: float = 0.0,
    lambda_diversity: float = 0.0,
    form: str = "kl",
    temperature: float = 1.0,
    top_k: int = 0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    lambda_task: float = 1.0,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    all_counted: bool = False,
) -> TokenTerms:
    """Cross-entropy, consistency and entropy from hidden states, logits = softcap((hidden @ weight.T + bias) * scale).

    Args:
        hidden: (M, d) final hidden states of the student.
        teacher_hidden: (M, d) those of the pre-trained model; no gradient. May be None if lambda_consistency is 0;
            `consistency` is then 0.
        weight: (V, d) LM head. Gets a gradient if it requires one.
        labels: (M,) already aligned: labels[i] is the target of hidden[i]; -100 = not counted.
        lambda_consistency: Weight of the consistency term (`form`, `temperature` as in
            [`regularizers.consistency`][balora_plugin.regularizers.consistency]).
        lambda_diversity: Weight of minus the entropy over the `top_k` most likely tokens (0 = full vocabulary).
        bias: (V,) bias of the head.
        scale: Factor on the logits (Cohere, Granite).
        softcap: Cap c of c * tanh(logits / c) (Gemma 2).
        chunk_size: Rows a chunk; default from V.
        lambda_task: Weight of the cross-entropy in `loss` (0 leaves the terms alone).
        teacher_weight, teacher_bias: The teacher's head, if it is not the student's (a head that trains).
        all_counted: Promise that no label is -100; spares a synchronisation with the device.

    Raises:
        ValueError: shapes that do not match, or a consistency weight without teacher_hidden.

    >>> hidden, weight = torch.ones(3, 4), torch.ones(8, 4)
    >>> terms = token_terms(hidden, hidden, weight, torch.tensor([1, -100, 2]), lambda_consistency=1.0)
    >>> terms.count.item(), round(terms.loss.item(), 4)  # 2 log 8
    (2, 4.1589)
    """
    _check_shapes(hidden, teacher_hidden, weight, labels, lambda_consistency)
    if teacher_weight is None and teacher_bias is not None:
        raise ValueError("teacher_bias is given without teacher_weight: pass both, or neither.")
    options = _Options(
        float(lambda_task),
        float(lambda_consistency),
        float(lambda_diversity),
        form,
        float(temperature),
        top_k,
        float(scale),
        softcap,
        chunk_size or default_chunk(weight.shape[0]),
        torch.is_grad_enabled(),  # inside a Function's forward it never is
    )
    if teacher_hidden is not None and lambda_consistency == 0:
        teacher_hidden = None  # switched off, and its cost with it
    if not all_counted and bool((labels == -100).any()):  # drop ignored tokens before any product
        rows = (labels != -100).nonzero().squeeze(-1)
        hidden, labels = hidden[rows], labels[rows]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[rows]
    loss, sums = _TokenTermsFunction.apply(
        hidden, weight, bias, labels, teacher_hidden, teacher_weight, teacher_bias, options
    )
    count = torch.full((), labels.numel(), device=hidden.device)
    return TokenTerms(loss, sums[0], sums[1], sums[2], sums[3], sums[4], count)


class _TokenTermsFunction(torch.autograd.Function):
    """Sums over chunks; keeps gradients, not logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        wants = [want and options.differentiate for want in ctx.needs_input_grad[:3]]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        if teacher_weight is None:
            teacher_weight, teacher_bias = weight, bias
        sums = torch.zeros(6, dtype=accumulate, device=hidden.device)  # loss, task, consistency, -H, full H, correct
        grad_hidden = torch.zeros_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if wants[1] else None
        grad_bias = torch.zeros_like(bias, dtype=accumulate) if bias is not None and wants[2] else None
        leaf_weight = weight.detach().requires_grad_(bool(wants[1]))
        leaf_bias = None if bias is None else bias.detach().requires_grad_(bool(wants[2]))
        for start in range(0, hidden.shape[0], options.chunk_size):
            part = slice(start, start + options.chunk_size)
            with torch.no_grad():
                teacher = None
                if teacher_hidden is not None:
                    teacher = project(
                        teacher_hidden[part], teacher_weight, teacher_bias, options.scale, options.softcap
                    )
            with torch.set_grad_enabled(any(wants)):
                leaf = hidden[part].detach().requires_grad_(bool(wants[0]))
                logits = project(leaf, leaf_weight, leaf_bias, options.scale, options.softcap)
                loss, values = _chunk(logits, teacher, labels[part], options)
                if any(wants):
                    leaves = [x for x in (leaf, leaf_weight, leaf_bias) if x is not None and x.requires_grad]
                    grads = iter(torch.autograd.grad(loss, leaves))
                    if grad_hidden is not None:
                        grad_hidden[part] = next(grads)
                    if grad_weight is not None:
                        grad_weight += next(grads)
                    if grad_bias is not None:
                        grad_bias += next(grads)
            sums[0] += loss.detach()
            sums[1:] += values
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        values = sums[1:].clone()
        ctx.mark_non_differentiable(values)
        return sums[0].clone(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # the factor (1 / tokens, say) stays in its own precision: in bfloat16 it would shrink every gradient alike
        grads = [
            None if g is None else (g.to(torch.promote_types(g.dtype, grad_loss.dtype)) * grad_loss).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None)


def _chunk(logits: Tensor, teacher: Tensor | None, labels: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """logits, teacher (C, V), labels (C,) -> weighted loss (), and [task, consistency, -H_k, H, correct] sums (5,)."""
    task = F.cross_entropy(logits, labels, reduction="sum")
    loss = options.lambda_task * task
    zero = task.detach() * 0.0
    consistency = zero
    if teacher is not None:
        consistency = consistency_rows(logits, teacher, form=options.form, temperature=options.temperature).sum()
        loss = loss + options.lambda_consistency * consistency
    diversity = zero
    if options.lambda_diversity:
        diversity = -entropy_rows(logits, top_k=options.top_k).sum()
        loss = loss + options.lambda_diversity * diversity
    with torch.no_grad():
        plain = logits.detach()
        full_known = options.lambda_diversity and not 0 < options.top_k < plain.shape[-1]
        entropy = -diversity if full_known else entropy_rows(plain).sum()
        if not options.lambda_diversity:
            diversity = -(
                entropy if not 0 < options.top_k < plain.shape[-1] else entropy_rows(plain, top_k=options.top_k).sum()
            )
        correct = (plain.argmax(dim=-1) == labels).sum().to(plain.dtype)
        values = torch.stack([task.detach(), consistency.detach(), diversity.detach(), entropy.detach(), correct])
    return loss, values


def _check_shapes(
    hidden: Tensor, teacher_hidden: Tensor | None, weight: Tensor, labels: Tensor, lambda_consistency: float
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (M, d) and weight (V, d) do not match: {tuple(hidden.shape)}, {tuple(weight.shape)}.")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels must be ({hidden.shape[0]},), aligned with hidden, got {tuple(labels.shape)}.")
    if lambda_consistency and teacher_hidden is None:
        raise ValueError(f"lambda_consistency={lambda_consistency} needs teacher_hidden, got None.")
    if teacher_hidden is not None and teacher_hidden.shape != hidden.shape:
        raise ValueError(f"teacher_hidden {tuple(teacher_hidden.shape)} must be like hidden {tuple(hidden.shape)}.")
