"""What the token terms are given, as a few named tuples. Imports torch alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head import Head

IGNORED = -100


class TaskForm(NamedTuple):
    """The form of a row's task loss: its cross-entropy, of whose target the part `smoothing` is spread evenly over the
    vocabulary; with `dft` times the probability of its target, which has no gradient. Not both."""

    smoothing: float = 0.0
    dft: bool = False


PLAIN_TASK = TaskForm()  # the cross-entropy itself


class TermForm(NamedTuple):
    """Which consistency term (a name of `balora_plugin.consistency`) at which temperature, the entropy over the `top_k`
    most likely tokens (0 = full vocabulary), and the form of the task loss."""

    consistency: str = "kl"
    temperature: float = 1.0
    top_k: int = 0
    task: TaskForm = PLAIN_TASK


class TopLogProbs(NamedTuple):
    """What is kept of a teacher's distribution at some temperature.

    Attributes:
        ids: (M, K) integers: its K most likely tokens, each once.
        log_probs: (M, K) their log-probabilities, any floating type.
        log_tail: (M,) the logarithm of the mass of the V - K others; -inf if there are none.

    Rounding is taken out where it is used: the K + 1 masses of a row are divided by their sum.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor


class TeacherStates(NamedTuple):
    """The teacher's final hidden states (M, d), and its head where that is not the student's.

    Of that head weight and bias are taken: scale and cap are the student's.
    """

    hidden: Tensor
    head: Head | None = None


class MetRows(NamedTuple):
    """The rows of a batch that the teacher's tensors are of, (k,), and those without a teacher, (B - k,): int64."""

    met: Tensor
    others: Tensor


class TokenLoss(NamedTuple):
    """What is asked of rows of the student's states.

    Tensors are inputs of a graph that holds this, the rest are constants. So `weights` of task, consistency and
    diversity are a tensor, (3,) float64 on the CPU: a compiler would specialise on every float of a schedule.
    `compiled`: the passes over whole blocks of logits run as compiled loops. No teacher leaves the consistency term
    out. `task_rows` (M,): factors of each row's task loss, beside that of all in `weights`; None: 1. `met`: of a batch
    (B, T, ...) that is not flattened yet, the rows that meet the teacher; None: all.
    """

    head: Head
    teacher: TeacherStates | TopLogProbs | None
    form: TermForm
    weights: Tensor
    compiled: bool = False
    task_rows: Tensor | None = None
    met: MetRows | None = None


class Wants(NamedTuple):
    """Whose gradients are taken."""

    hidden: bool
    weight: bool
    bias: bool


class Execution(NamedTuple):
    """How the terms are computed: rows a chunk, the dtype of the products, the gradients that are taken."""

    chunk_size: int
    dtype: torch.dtype
    wants: Wants
