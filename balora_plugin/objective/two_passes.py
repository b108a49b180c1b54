"""The teacher's and the student's pass of one micro-batch: two, or what they share once, or one inside the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .request import StepRequest
from .some_rows import met_rows, of_rows, only_rows, rows_run


class TwoPasses:
    """Runs both in the way that a request asks: the teacher's first, then the student's, then what came with it.

    Args:
        model: The student, whose layers may serve both.
        request: What is asked.
        inputs: What the teacher is given, as keywords; the rows of it that meet the teacher are the request's.
        teacher: Runs the teacher on inputs in a pass of its own and returns its states.
        student: Runs the student's pass and returns what the model gives.

    Attributes:
        met: Which rows meet the teacher; None: all.
        rows: Which rows the teacher runs on, (k,) int64; None: all. More than are met where a batch cannot be taken
            apart, or where the pass is the proof of what teacher and student share.
        inputs: The teacher's inputs, these rows alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        request: StepRequest,
        inputs: dict[str, Any],
        *,
        teacher: Callable[[dict[str, Any]], Tensor],
        student: Callable[[], Any],
    ) -> None:
        self._request, self._student = request, student
        self._shared = request.shares(model)
        self.met = met_rows(request.teacher_rows, inputs)
        proven = self._shared is None or self._shared.proven
        self.rows = rows_run(inputs, self.met) if proven and self.met is not None else None
        self.inputs = inputs if self.rows is None else only_rows(inputs, self.rows)
        self._teacher = partial(teacher, self.inputs)
        # a teacher of some rows goes on from what the student's pass has found of the layers that both share; then it
        # does in every process, for else a split model's would be gathered in another order in some
        told_apart = self.rows is not None or request.teacher_late
        self._begins_late = self._shared is not None and proven and told_apart
        self._layered = None if self._begins_late else request.layered(model)

    def teacher(self) -> Tensor | None:
        """Returns the teacher's states; None where they come with the student's, or where nothing asks for them."""
        if not self._request.measured.consistency or self._begins_late:
            return None
        with self._request.part("teacher"):
            if self._layered is not None and self._layered.begin(self._teacher, self._student, self._shared):
                return None
            self._layered = None
            return self._teacher() if self._shared is None else self._shared.teacher(self._teacher)

    def student(self) -> Any:
        """Returns what the student's pass gives; the teacher's was begun before, if it runs in this micro-batch."""
        with ExitStack() as inside:
            if self._shared is not None:
                inside.enter_context(self._shared.kept_for_rows() if self._begins_late else self._shared.student())
            if self._layered is not None:
                inside.enter_context(self._layered.student(self._request.part))
            return self._student()

    def late_teacher(self) -> Tensor | None:
        """Returns the teacher's states where they come with the student's, None where they were there before."""
        if not self._begins_late and self._layered is None:
            return None
        with self._request.part("teacher"):
            if self._layered is not None:
                return self._layered.end(self._teacher)
            assert self._shared is not None
            return self._shared.teacher_of(self.rows, self._teacher)

    def at_met(self, found: Tensor) -> Tensor | None:
        """Returns, of what the teacher gave for its rows (k, ...), that of those that are met; None where none is."""
        if self.met is None:
            return found
        if not len(self.met.met):
            return None
        ran = self.rows is not None and len(self.rows) == len(self.met.met)
        return found if ran else of_rows(found, self.met.met)
