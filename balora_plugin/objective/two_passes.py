"""The teacher's and the student's pass of one micro-batch: two, or what they share once, or one inside the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .request import StepRequest


class TwoPasses:
    """Runs both in the way that a request asks: the teacher's first, then the student's, then what came with it.

    Args:
        model: The student, whose layers may serve both.
        request: What is asked.
        teacher: Runs the teacher in a pass of its own and returns its states.
        student: Runs the student's pass and returns what the model gives.
    """

    def __init__(
        self, model: PreTrainedModel, request: StepRequest, teacher: Callable[[], Tensor], student: Callable[[], Any]
    ) -> None:
        self._request = request
        self._teacher, self._student = teacher, student
        self._shared, self._layered = request.shares(model), request.layered(model)

    def teacher(self) -> Tensor | None:
        """Returns the teacher's states; None where they come with the student's."""
        if self._layered is not None and self._layered.begin(self._teacher, self._student, self._shared):
            return None
        self._layered = None
        return self._teacher() if self._shared is None else self._shared.teacher(self._teacher)

    def student(self) -> Any:
        """Returns what the student's pass gives; the teacher's was begun before, if it runs in this micro-batch."""
        with ExitStack() as inside:
            if self._shared is not None:
                inside.enter_context(self._shared.student())
            if self._layered is not None:
                inside.enter_context(self._layered.student(self._request.part))
            return self._student()

    def late_teacher(self) -> Tensor | None:
        """Returns the teacher's states where they came with the student's, None where they were there before."""
        if self._layered is None:
            return None
        with self._request.part("teacher"):
            return self._layered.end(self._teacher)
