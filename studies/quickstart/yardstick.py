"""Measures models on the task's held-out pairs and on text of another kind, against the model before training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from .answers import answer
from .base import BaseModel
from .measure import (
    HeldOutBatch,
    Measurement,
    held_out_batches,
    iterate_logits,
    measure,
    measure_logits,
    reference_logits,
)
from .progress import Phase
from .task import Task


class Yardstick:
    """The batches, and the pre-trained model's logits on them: computed when the first model is measured."""

    def __init__(self, base: BaseModel, task: Task, max_length: int, batch_size: int) -> None:
        self.base, self.task = base, task
        self.tokenizer = base.load_tokenizer()
        self.held_out, self.other = (
            held_out_batches(pairs, self.tokenizer, max_length, batch_size) for pairs in (task.held_out, task.other)
        )

    @cached_property
    def before(self) -> Any:
        """The pre-trained model."""
        return self.base.load_model()

    @cached_property
    def _reference(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        held_out, other = (reference_logits(self.before, batches) for batches in (self.held_out, self.other))
        return held_out, other

    def measure(self, model: Any, label: str) -> tuple[Measurement, float, list[str]]:
        """(what the held-out pairs say, the drift on other text, the answers to the questions)."""
        with Phase(f"{label}: measuring") as phase:
            phase.at("on held-out pairs")
            held_out, other_text = self._reference
            logits = held_out if model is self.before else iterate_logits(model, self.held_out)
            measured = measure_logits(logits, self.held_out, held_out)
            phase.at("on other text")
            other = 0.0 if model is self.before else measure(model, self.other, other_text).drift
            answers = []
            for place, question in enumerate(self.task.questions):
                phase.at(f"answering question {place + 1} of {len(self.task.questions)}")
                answers.append(answer(model, self.tokenizer, question.prompt))
        return measured, other, answers

    @property
    def first_batch(self) -> HeldOutBatch:
        """The batch on which a reloaded adapter is compared."""
        return self.held_out[0]
