"""`drift_target`: lambda_consistency by dual ascent in log space, so that the drift from the teacher is a budget."""

from __future__ import annotations

import math
from typing import Any

from ..schedules import Lambdas
from .observed import Observed
from .smoothing import RunningMean

RANGE = 1000.0  # the weight stays within this factor of its start, both ways
GAIN = 2.0  # log weight per relative error
LOOSER, TIGHTER = -0.5, 1.0  # bounds of the relative error
APPROACH = 5.0  # log weight that is lost over a whole run in which the drift never comes near its budget
UNUSED = 20.0  # a term that lost so much of its weight, and still is below its budget, does not hold the model back
_HELD = 1.1  # within 10 %


class HeldDrift:
    """Holds the mean drift at `target`: a proportional and an integral part, in log space.

    With D the running mean of the measured drift and e = D / target - 1, bounded to -0.5 ... 1, each measurement does

        log weight += 2 (e - e_before) + (2 / n) e

    and keeps the weight within `start` / 1000 ... `start` * 1000. The sum over e is dual ascent on the multiplier of
    the constraint drift <= target; the difference damps it, for a drift answers its weight late (an optimizer has
    momentum). A fixed point is D = target alone, and what the sum leaves over a long time is the mean's distance from
    it. Until D first reaches half the target an error says nothing: the model is on its way, and the weight falls by
    5 / steps of its logarithm a measurement, so that one that keeps the model from the budget is left in the end.

    Args:
        target: The budget, nats per counted token (sample).
        start: The weight before anything was measured.
        steps: Optimizer steps of the run, which set the pace: n = steps / 20, from 10 to 200; the running mean is over
            steps / 60, from 3 to 50.
    """

    def __init__(self, target: float, start: float, steps: int) -> None:
        self.target, self.start = target, start
        self.pace = min(max(steps / 20.0, 10.0), 200.0)
        self.smoothed = RunningMean(min(max(steps / 60.0, 3.0), 50.0))
        self.loosening = APPROACH / max(steps, 1)
        self.weight, self._error, self._near = start, LOOSER, False
        self._at_most = 0  # measurements in a row at the upper bound, above the budget

    def observe(self, measured: Observed) -> None:
        """Takes one step's drift."""
        if measured.drift is None:
            return
        mean = self.smoothed.add(measured.drift)
        error = min(max(mean / self.target - 1.0, LOOSER), TIGHTER)
        self._near = self._near or error > LOOSER
        change = GAIN * (error - self._error) + GAIN / self.pace * error if self._near else -self.loosening
        low, high = self.start / RANGE, self.start * RANGE
        self.weight, self._error = min(max(self.weight * math.exp(change), low), high), error
        self._at_most = self._at_most + 1 if self.weight == high and mean > _HELD * self.target else 0

    def weights(self, scheduled: Lambdas, full: Lambdas) -> Lambdas:
        """The schedule's weights with this one in its place: a budget leaves a schedule nothing to say."""
        return scheduled._replace(consistency=self.weight)

    def finding(self, *, ended: bool) -> str | None:
        """Says that the budget cannot be held, and what to write; None where there is nothing to say.

        `ended`: the run has, so that what it has not reached it does not reach.
        """
        mean, target = self.smoothed.mean, self.target
        if self._at_most > self.pace:
            return (
                f"drift_target={target:g} cannot be held: the drift is {mean:.2g} with lambda_consistency at its upper "
                f"bound, {self.weight:g}. Write drift_target={_two_digits(mean)} or more, a smaller learning rate, or "
                "a larger lambda_consistency, which is where the weight starts."
            )
        unused = not self._near or self.weight < self.start / UNUSED
        if ended and unused and mean * _HELD < target:
            return (
                f"drift_target={target:g} is above what this run reaches: the drift is {mean:.2g} with "
                f"lambda_consistency at {self.weight:.2g}, so the term hardly acts. Write less than "
                f"drift_target={_two_digits(mean)}, or leave it out."
            )
        return None

    def first_step(self, moved: float) -> str | None:
        """Says that the drift after the first optimizer step that moved anything is above the budget; else None."""
        if moved <= self.target:
            return None
        return (
            f"drift_target={self.target:g} is below what one optimizer step moves, a drift of {moved:.2g}: no weight "
            f"holds it while steps are so large. Write drift_target={_two_digits(2 * moved)} or more, or a smaller "
            "learning rate."
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        kept = {"weight": self.weight, "error": self._error, "near": self._near, "at_most": self._at_most}
        return {**kept, "smoothed": self.smoothed.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.weight, self._error, self._near = state["weight"], state["error"], state["near"]
        self._at_most = state["at_most"]
        self.smoothed.load(state["smoothed"])


def _two_digits(value: float) -> str:
    return f"{value:.2g}"
