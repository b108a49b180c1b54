"""What a step measures for the rules, and what a rule is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ..schedules import Lambdas


class Observed(NamedTuple):
    """What one optimizer step measured, over all its micro-batches and ranks; None: it did not.

    Attributes:
        drift: Mean KL(teacher || student) at T = 1 of a counted token (sample), in nats.
        task: Mean task loss of the same tokens (samples).
        teacher_entropy: Mean entropy of the teacher over its largest possible one, from 0 to 1.
        shares: {term: its gradient's norm over the task's, at a weight of 1}, of terms that acted.
    """

    drift: float | None = None
    task: float | None = None
    teacher_entropy: float | None = None
    shares: Mapping[str, float] | None = None


class Rule(Protocol):
    """Sets one or more weights from what the steps before have measured."""

    def observe(self, measured: Observed) -> None:
        """Takes what a step has measured; what the rule does not read is None or ignored."""

    def weights(self, scheduled: Lambdas, full: Lambdas) -> Lambdas:
        """Returns the weights of the next step, from the schedule's and the configured ones."""

    def finding(self, *, ended: bool) -> str | None:
        """Says what cannot be held, and what to write; None where there is nothing to say."""

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run goes on from, as JSON."""

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
