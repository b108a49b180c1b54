"""The token terms as a torch.library operator: opaque to torch.compile, so that they never break a graph.

The operator's forward pass takes the gradients as well; its backward pass scales them. Imports torch alone.
"""

from __future__ import annotations

from typing import Any, List  # noqa: UP035  (see `wants`)

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunk_loop import ChunkLoop
from .head import Head
from .loss import Execution, TaskForm, TeacherStates, TermForm, TokenLoss, TopLogProbs, Wants
from .saved_gradients import kept_dtype, scaled


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
    weights: Tensor,
    task_rows: Tensor | None,
    form: str,
    temperature: float,
    top_k: int,
    smoothing: float,
    dft: bool,
    scale: float,
    softcap: float | None,
    compiled: bool,
    chunk_size: int,
    dtype: torch.dtype,
    wants: List[bool],  # noqa: UP006  (torch 2.6 makes a schema of typing's name alone)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs [`ChunkLoop`] on flat arguments, as torch.library takes them: see [`flat`].

    Returns: the sums (6,): loss, task, consistency, -H_k, H, top-1 hits; and the loss's gradients by hidden, weight and
    bias, empty where not wanted. That by float16 hidden states is float32: it is scaled later.
    """
    teacher: TeacherStates | TopLogProbs | None = None
    if top_ids is not None and top_log_probs is not None and top_log_tail is not None:
        teacher = TopLogProbs(top_ids, top_log_probs, top_log_tail)
    elif teacher_hidden is not None:
        own = None if teacher_weight is None else Head(teacher_weight, teacher_bias, scale, softcap)
        teacher = TeacherStates(teacher_hidden, own)
    terms = TermForm(form, temperature, top_k, TaskForm(smoothing, dft))
    loss = TokenLoss(Head(weight, bias, scale, softcap), teacher, terms, weights, compiled, task_rows)
    return ChunkLoop(hidden, labels, loss, Execution(chunk_size, dtype, Wants(*wants))).run()


def flat(hidden: Tensor, labels: Tensor, loss: TokenLoss, execution: Execution) -> tuple[Any, ...]:
    """Returns the operator's arguments, in its order; the teacher's tensors without a graph."""
    head, teacher = loss.head, loss.teacher
    states: Tensor | None = None
    own: tuple[Tensor | None, ...] = (None, None)
    top: tuple[Tensor | None, ...] = (None, None, None)
    if isinstance(teacher, TopLogProbs):
        top = tuple(x.detach() for x in teacher)
    elif teacher is not None:
        states = teacher.hidden.detach()
        if teacher.head is not None:
            bias = teacher.head.bias
            own = (teacher.head.weight.detach(), None if bias is None else bias.detach())
    name, temperature, top_k, task = loss.form
    form = (name, float(temperature), top_k, float(task.smoothing), task.dft, float(head.scale), head.softcap)
    factors = None if loss.task_rows is None else loss.task_rows.detach()
    how = (loss.compiled, execution.chunk_size, execution.dtype, list(execution.wants))
    return hidden, head.weight, head.bias, labels, states, *own, *top, loss.weights, factors, *form, *how


token_terms_op = torch.library.custom_op("balora::token_terms", compute_token_terms, mutates_args=())


@token_terms_op.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wants = Wants(*others[-1])
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(6, dtype=wide),
        torch.empty_like(hidden, dtype=kept_dtype(hidden.dtype)) if wants.hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if wants.weight else weight.new_empty(0, dtype=wide),
        hidden.new_empty(weight.shape[0] if wants.bias else 0, dtype=wide),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wants, ctx.others = inputs[-1], len(inputs) - len(Wants._fields)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[: len(Wants._fields)]]
    ctx.save_for_backward(*(g.detach() for g in output[1:]))
    ctx.mark_non_differentiable(*output[1:])


@once_differentiable
def _scale_gradients(ctx: Any, grad_sums: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    factor = grad_sums[0]
    grads = [
        scaled(g, factor, dtype) if want else None
        for g, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
    ]
    return (*grads, *([None] * ctx.others))


token_terms_op.register_autograd(_scale_gradients, setup_context=_keep_gradients)
