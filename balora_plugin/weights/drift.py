"""`drift_target`: lambda_consistency by dual ascent in log space, so that the drift from the teacher is a budget."""

from __future__ import annotations

import math
from typing import Any

from ..schedules import Lambdas
from .observed import Observed
from .smoothing import RunningMean

GAIN = 2.0  # log weight per relative error
LOOSER, TIGHTER = -0.5, 1.0  # bounds of the relative error
LEAST, MOST = 1e-3, 10.0  # bounds of weight x budget, over the task's loss when training began
RANGE = 1e6  # where that ratio means nothing the weight stays within this factor of its start, both ways
FALL, IDLE = 25.0, 10.0  # log weight lost over a run that never comes near its budget; measurements until it falls so
_HELD = 1.1  # within 10 %


class HeldDrift:
    """Holds the mean drift at `target`: a proportional and an integral part, in log space.

    With D the running mean of the measured drift and e = D / target - 1, bounded to -0.5 ... 1, each measurement does

        log weight += 2 (e - e_before) + (2 / n) e

    The sum over e is dual ascent on the multiplier of the constraint drift <= target; the difference damps it, for a
    drift answers its weight late (an optimizer has momentum), and the sum is slower than that answer, or the two swing.
    A fixed point is D = target alone, and what the sum leaves over a long time is the mean's distance from it.

    Below half the target an error says only that the weight is too high, or that the model is on its way: the weight
    falls by 25 / steps of its logarithm, the first ten such measurements in a row by less.

    No fall is without bound, and no start is far off: the weight stays within 0.001 ... 10 of L / target, where L is
    the task's loss when training began. Where the least task loss at a drift D is convex in D, its slope at the target,
    which is the multiplier, is at most L / target. And a term that weighs less than a thousandth of
    the task's loss when the budget is spent holds nothing.

    Args:
        target: The budget, nats per counted token (sample).
        start: The weight before anything was measured.
        steps: Optimizer steps of the run, which set the pace: n = steps / 12, from 20 to 400; the running mean is over
            steps / 100, from 2 to 50.
        in_nats: The term is one of probabilities, so that its weight has a scale; else it stays within a factor of 1e6
            of its start.
    """

    def __init__(self, target: float, start: float, steps: int, *, in_nats: bool = True) -> None:
        self.target, self.start, self.in_nats = target, start, in_nats
        self.pace = min(max(steps / 12.0, 20.0), 400.0)
        self.smoothed = RunningMean(min(max(steps / 100.0, 2.0), 50.0))
        self.fall = FALL / max(steps, 1)
        self.bounds = (start / RANGE, start * RANGE)
        self.weight, self._error = start, LOOSER
        self._task: float | None = None  # the task's loss when training began
        self._below = 0  # measurements in a row below half the budget
        self._at_most = 0  # those at the upper bound, above the budget

    def observe(self, measured: Observed) -> None:
        """Takes one step's drift, and the first step's task loss."""
        if measured.drift is None or not math.isfinite(measured.drift):
            return
        if self._task is None and self.in_nats and measured.task and math.isfinite(measured.task):
            self._scale(measured.task)
        mean = self.smoothed.add(measured.drift)
        error = min(max(mean / self.target - 1.0, LOOSER), TIGHTER)
        self._below = self._below + 1 if error == LOOSER else 0
        pull = -self.fall * min(self._below / IDLE, 1.0) if self._below else GAIN / self.pace * error
        change = GAIN * (error - self._error) + pull
        self.weight, self._error = self._bounded(self.weight * math.exp(change)), error
        self._at_most = self._at_most + 1 if self.weight == self.bounds[1] and mean > _HELD * self.target else 0

    def _scale(self, task: float) -> None:
        """Bounds the weight by the task's loss."""
        self._task = task
        self.bounds = (LEAST * task / self.target, MOST * task / self.target)
        self.weight = self._bounded(self.weight)

    def _bounded(self, weight: float) -> float:
        low, high = self.bounds
        return min(max(weight, low), high)

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
                f"bound, {self.weight:.2g}. Write drift_target={_two_digits(mean)} or more, or a smaller learning rate."
            )
        if ended and self.weight < 2.0 * self.bounds[0] and mean * _HELD < target:
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
        kept = {"weight": self.weight, "error": self._error, "below": self._below, "at_most": self._at_most}
        return {**kept, "task": self._task, "smoothed": self.smoothed.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave; one of an earlier release has no task loss: the next measured one is taken.

        The bounds are those of the budget now, which may be another than the state's.
        """
        self.weight, self._error = state["weight"], state["error"]
        self._below, self._at_most = state.get("below", 0), state["at_most"]
        self.smoothed.load(state["smoothed"])
        if self.in_nats and state.get("task") is not None:
            self._scale(state["task"])


def _two_digits(value: float) -> str:
    return f"{value:.2g}"
