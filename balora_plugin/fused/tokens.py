"""Task loss, consistency and entropy of counted tokens in one pass over chunks of rows. Imports torch alone.

The gradient with respect to the hidden states (and the head, where it trains) is taken chunk by chunk in the forward
pass, so only one chunk's logits exist at a time and nothing is recomputed in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..consistency import NAMES
from ..regularizers import check_task_form
from .head import Head
from .loss import IGNORED, Execution, TaskForm, TeacherStates, TermForm, TokenLoss, TopLogProbs, Wants
from .ops import flat, token_terms_op
from .project import default_chunk, product_dtype
from .top import TOP_FORMS


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
    teacher_top: TopLogProbs | None = None,
    compiled: bool = False,
    task_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    dft: bool = False,
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
        chunk_size: Rows a chunk; default from V, d and the device.
        lambda_task: Weight of the cross-entropy in `loss` (0 leaves the terms alone).
        teacher_weight, teacher_bias: The teacher's head, if it is not the student's (a head that trains).
        teacher_top: In the place of teacher_hidden: (M, K) token ids and log-probabilities and (M,) log mass of the
            rest, at this temperature, see [`top_log_probs`][balora_plugin.fused.top]. The consistency term is then
            taken over K + 1 buckets (docs/method.md); not for "mse".
        task_weights: (M,) factor of each row's cross-entropy, in `loss` and in `task`; no gradient. None: 1.
        label_smoothing, dft: The form of the cross-entropy, as in
            [`regularizers.cross_entropy`][balora_plugin.regularizers.cross_entropy].
        compiled: Run the passes over the logits as compiled loops (seconds at the first call for each vocabulary).

    Raises:
        ValueError: shapes that do not match, a consistency weight without teacher_hidden or teacher_top, or a form of
            the cross-entropy that there is not.

    >>> hidden, weight = torch.ones(3, 4), torch.ones(8, 4)
    >>> terms = token_terms(hidden, hidden, weight, torch.tensor([1, -100, 2]), lambda_consistency=1.0)
    >>> terms.count.item(), round(terms.loss.item(), 4)  # 2 log 8
    (2, 4.1589)
    """
    check_task_form(label_smoothing, dft)
    _check_shapes(hidden, teacher_hidden, weight, labels, lambda_consistency if teacher_top is None else 0.0)
    if teacher_weight is None and teacher_bias is not None:
        raise ValueError("teacher_bias is given without teacher_weight: pass both, or neither.")
    if form not in NAMES:
        raise ValueError(f"form={form!r} is not known: write {', '.join(map(repr, NAMES))}.")
    if teacher_top is not None:
        _check_top(teacher_top, hidden.shape[0], form)
        if teacher_hidden is not None or teacher_weight is not None:
            raise ValueError("teacher_top stands in the place of teacher_hidden and teacher_weight: pass one of both.")
    teacher: TeacherStates | TopLogProbs | None = None  # switched off, and its cost with it
    if lambda_consistency and teacher_top is not None:
        teacher = teacher_top
    elif lambda_consistency and teacher_hidden is not None:
        own = None if teacher_weight is None else Head(teacher_weight, teacher_bias)
        teacher = TeacherStates(teacher_hidden, own)
    if task_weights is not None and task_weights.shape != labels.shape:
        raise ValueError(f"task_weights must be like labels {tuple(labels.shape)}, got {tuple(task_weights.shape)}.")
    weights = torch.tensor([lambda_task, lambda_consistency, lambda_diversity], dtype=torch.float64)
    head = Head(weight, bias, float(scale), softcap)
    terms = TermForm(form, float(temperature), top_k, TaskForm(float(label_smoothing), dft))
    loss = TokenLoss(head, teacher, terms, weights, compiled, task_weights)
    return weighted_token_terms(hidden, labels, loss, chunk_size)


def weighted_token_terms(hidden: Tensor, labels: Tensor, loss: TokenLoss, chunk_size: int | None = None) -> TokenTerms:
    """[`token_terms`] without its checks: hidden (M, d), labels (M,), and what is asked of them."""
    weight, bias = loss.head.weight, loss.head.bias
    grad = torch.is_grad_enabled()
    execution = Execution(
        chunk_size or default_chunk(weight.shape[0], hidden.device.type, weight.shape[1]),
        product_dtype(hidden, weight),
        Wants(*(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))),
    )
    sums, _, _, _ = token_terms_op(*flat(hidden, labels, loss, execution))
    task, consistency, diversity, entropy, correct = sums.detach()[1:].unbind()
    return TokenTerms(sums[0], task, consistency, diversity, entropy, correct, (labels != IGNORED).sum())


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


def _check_top(top: TopLogProbs, rows: int, form: str) -> None:
    if form not in TOP_FORMS:
        raise ValueError(
            f"form={form!r} needs all logits of the teacher: pass teacher_hidden instead of teacher_top, or write "
            f"{', '.join(map(repr, TOP_FORMS))}."
        )
    shapes = [tuple(x.shape) for x in top]
    if top.ids.ndim != 2 or shapes[0] != shapes[1] or shapes[0][0] != rows or shapes[2] != (rows,):
        raise ValueError(
            f"teacher_top must be ids ({rows}, K), log_probs ({rows}, K) and log_tail ({rows},), aligned with hidden, "
            f"got {', '.join(map(str, shapes))}."
        )
