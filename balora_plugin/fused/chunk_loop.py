"""The token terms and their gradients over chunks of counted rows: one chunk's logits exist at a time.

Imports torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .chunk import Rows, Weights, by_row, compiled_chunk, in_base_2, token_chunk
from .head import Head
from .loss import IGNORED, Execution, TeacherStates, TermForm, TokenLoss, TopLogProbs, Wants
from .project import Projection, block_rows
from .saved_gradients import kept_dtype

LOG_2 = math.log(2.0)
SLOPE = 5  # the scratch buffer that no form of the terms uses


class _Buffers:
    """Logits of a chunk, of one model or of two, and scratch for a block of its rows; each is made once.

    `small`: rows of a block; `large`: of one whose passes are compiled, 0 where none are.
    """

    def __init__(self, rows: Rows, loss: TokenLoss, chunk_size: int, wide: torch.dtype) -> None:
        device, vocabulary = rows.student.device, loss.head.weight.shape[0]
        top = isinstance(rows.teacher, TopLogProbs)
        self.chunk_size = min(chunk_size, max(len(rows.labels), 1))
        self.small = min(self.chunk_size, block_rows(vocabulary, device.type))
        self.large = block_rows(vocabulary, device.type, compiled=True) if loss.compiled and not top else 0
        models = 1 if rows.teacher is None or top else 2
        self.logits = torch.empty(models * self.chunk_size, vocabulary, dtype=wide, device=device)
        self._scratch: dict[int, Tensor] = {}

    def scratch(self, index: int, rows: int) -> Tensor:
        """Buffer `index` (rows, V), the same for the same index."""
        if index not in self._scratch:
            size = max(self.small, self.large) if index == SLOPE else self.small
            self._scratch[index] = self.logits.new_empty(size, self.logits.shape[1])
        return self._scratch[index][:rows]

    def blocks(self, size: int) -> Iterator[tuple[slice, bool]]:
        """Blocks of a chunk of `size` rows, and whether they are compiled: one shape alone is."""
        first = 0
        while first < size:
            whole = self.large > 0 and first + self.large <= size
            rows = self.large if whole else self.small
            yield slice(first, first + rows), whole
            first += rows


class _Gradients:
    """The loss's gradients by hidden (M, d), weight (V, d) and bias (V,); empty where they are not wanted."""

    def __init__(self, hidden: Tensor, head: Head, wants: Wants, wide: torch.dtype) -> None:
        weight = head.weight
        self.wants, self.scale = wants, head.scale
        kept = kept_dtype(hidden.dtype)
        self.hidden = torch.empty_like(hidden, dtype=kept) if wants.hidden else hidden.new_empty(0)
        self.weight = torch.zeros_like(weight, dtype=wide) if wants.weight else weight.new_empty(0, dtype=wide)
        self.bias = torch.zeros(weight.shape[0] if wants.bias else 0, dtype=wide, device=hidden.device)

    def add(self, part: slice, z: Tensor, states: Tensor, head: Projection) -> None:
        """z (C, V): the gradient by the uncapped logits of the rows `part`, whose states (C, d) `head` took."""
        if self.wants.bias:
            self.bias += z.sum(dim=0) * self.scale
        gradient, lift = head.narrowed(z)
        if self.wants.hidden:
            head.into_hidden(gradient, lift, self.hidden[part])
        if self.wants.weight:
            head.into_weight(gradient, lift, states, self.weight)


class ChunkLoop:
    """One call of the operator.

    Args:
        hidden: (M, d) final hidden states of the student.
        labels: (M,) targets, -100 = not counted.
        loss: What is asked; its tensors are on hidden's device, but for `weights`.
        execution: How it is computed.
    """

    def __init__(self, hidden: Tensor, labels: Tensor, loss: TokenLoss, execution: Execution) -> None:
        self.form, self.dtype = loss.form, execution.dtype
        self.wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.weights = Weights(*loss.weights.tolist())
        self.differentiate = any(execution.wants)
        self.hidden = hidden
        teacher = loss.teacher
        factors = self._factors(labels, loss.task_rows)
        rows = Rows(hidden, labels, teacher.hidden if isinstance(teacher, TeacherStates) else teacher, factors)
        counted = (labels != IGNORED).nonzero().squeeze(-1)  # before any product
        self.counted = None if counted.numel() == labels.numel() else counted
        self.rows = rows if self.counted is None else rows.at(self.counted)
        self.buffers = _Buffers(self.rows, loss, execution.chunk_size, self.wide)
        self.unit, self.compiled, self.numbers = 1.0, None, loss.weights
        vocabulary, device = loss.head.weight.shape[0], hidden.device
        if self.buffers.large:
            self.compiled = compiled_chunk(self.form, self.differentiate, bool(self.weights.diversity))
            self.numbers = loss.weights.to(device, self.wide, non_blocking=True)
        elif device.type == "cpu" and self.dtype == self.wide and not isinstance(teacher, TopLogProbs):
            self.unit = LOG_2 if in_base_2(self.form, vocabulary) else 1.0
        self.head = self.teacher_head = Projection(loss.head, self.dtype, self.wide, self.unit)
        own = teacher.head if isinstance(teacher, TeacherStates) else None
        if own is not None and not (_same(loss.head.weight, own.weight) and _same(loss.head.bias, own.bias)):
            self.teacher_head = Projection(own, self.dtype, self.wide, self.unit)
        self.gradients = _Gradients(self.rows.student, loss.head, execution.wants, self.wide)

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums (6,): loss, task, consistency, -H_k, H, top-1 hits; the gradients by hidden, weight and bias."""
        device, count, step = self.hidden.device, len(self.rows.labels), self.buffers.chunk_size
        terms = [torch.zeros(0, 5, dtype=self.wide, device=device)]
        for start in range(0, count, step):
            terms += self._chunk(slice(start, min(start + step, count)))
        sums = torch.cat([torch.zeros(1, dtype=self.wide, device=device), torch.cat(terms).sum(dim=0)])
        sums[1:5] *= self.unit
        task, consistency, diversity = self.weights
        sums[0] = task * sums[1] + consistency * sums[2] + diversity * sums[3]
        by_hidden = self.gradients.hidden
        if self.gradients.wants.hidden and self.counted is not None:
            everywhere = torch.zeros_like(self.hidden, dtype=by_hidden.dtype)
            by_hidden = everywhere.index_copy_(0, self.counted, by_hidden)
        return sums, by_hidden, self.gradients.weight, self.gradients.bias

    def _chunk(self, part: slice) -> list[Tensor]:
        """The terms of one chunk's rows, its gradients added."""
        rows = self.rows.at(part)
        states = rows.student.to(self.dtype)
        z, teacher = self._logits(states, rows.teacher)
        target = rows.labels.unsqueeze(1)
        capped = self.differentiate and self.head.cap is not None
        slopes = self.head.slope(z.gather(1, target)) if capped else None  # of the cap at the labels
        block = Rows(z, rows.labels, teacher, rows.task)
        terms = [self._block(block.at(inner), whole, capped) for inner, whole in self.buffers.blocks(len(z))]
        if not self.differentiate:
            return terms
        if self.weights.task:
            sharp = self.weights.task * (1.0 - self.form.task.smoothing)
            at_labels = by_row(torch.full_like(target, -sharp, dtype=self.wide), rows.task)
            z.scatter_add_(1, target, at_labels if slopes is None else at_labels * slopes)
        self.gradients.add(part, z, states, self.head)
        return terms

    def _factors(self, labels: Tensor, given: Tensor | None) -> Tensor | None:
        """Factors of the rows' task losses, or None where all are 1; of dft, which writes into them, our own."""
        if given is None:
            return torch.ones(labels.shape, dtype=self.wide, device=labels.device) if self.form.task.dft else None
        return given.to(self.wide, copy=self.form.task.dft)

    def _logits(
        self, states: Tensor, teacher: Tensor | TopLogProbs | None
    ) -> tuple[Tensor, Tensor | TopLogProbs | None]:
        """The student's logits of a chunk, in the buffer, and the teacher's, or what else there is of it."""
        size = len(states)
        z = self.buffers.logits[:size]
        if not isinstance(teacher, Tensor):
            return self.head.logits(states, z), teacher
        teacher = teacher.to(self.dtype)
        z_t = self.buffers.logits[size : 2 * size]
        if self.teacher_head is self.head:  # one product, so that the head is read once
            self.head.logits(torch.cat([states, teacher]), self.buffers.logits[: 2 * size])
        else:
            self.head.logits(states, z)
            self.teacher_head.logits(teacher, z_t)
        return z, z_t

    def _block(self, block: Rows, whole: bool, capped: bool) -> Tensor:
        """The terms of one block's rows; its logits become the gradient by the uncapped ones."""
        pool = partial(self.buffers.scratch, rows=len(block.student))
        slope = self.head.slope(block.student, pool(SLOPE)) if capped else None
        if whole and self.compiled is not None:
            terms = self.compiled(block, self.numbers)
        else:
            terms = token_chunk(
                block, self.weights, self.form, pool=pool, differentiate=self.differentiate, unit=self.unit
            )
        if slope is not None:
            block.student.mul_(slope)
        return terms


def loop_bytes(rows: int, head: Head, form: TermForm, execution: Execution, device_type: str, *, teacher: bool) -> int:
    """Returns the bytes that a call holds at its peak, beside what it is given and what it returns.

    Args:
        rows: M, every one of them counted.
        head: Its weight (V, d) is asked for shape and dtype alone.
        form: Which terms.
        execution: As of a call on `device_type`.
        device_type: Where the call runs.
        teacher: Whether the teacher's logits are made too.
    """
    vocabulary, size = head.weight.shape
    models, wide, narrow = 1 + teacher, torch.float32.itemsize, execution.dtype.itemsize
    chunk = min(execution.chunk_size, max(rows, 1))
    scratch = (2 if in_base_2(form, vocabulary) else 3) if teacher else 1
    scratch += head.softcap is not None
    block = min(chunk, block_rows(vocabulary, device_type))
    held = (models * chunk + scratch * block) * vocabulary * wide
    held += models * chunk * size * narrow  # the chunk's states
    if narrow < wide:  # what the product gives before it is widened, and takes again
        held += models * chunk * vocabulary * narrow
    if head.weight.dtype != execution.dtype:
        held += vocabulary * size * narrow
    return held + models * rows * size * narrow  # the counted rows, without the others


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two heads are one, under two names."""
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
