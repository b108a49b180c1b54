"""`schedule: adaptive`: lambda_consistency by how sure the teacher is, as the ICLR code has it."""

from __future__ import annotations

from typing import Any

from ..schedules import Lambdas
from .observed import Observed
from .smoothing import RunningMean

FLOOR = 0.1  # the smallest weight is this part of the configured one, as at the end of `iclr2026`
HORIZON = 10.0  # steps


def adaptive_weight(full: float, entropy: float) -> float:
    """least + (full - least) (1 - entropy), least = full / 10; `entropy`: the teacher's over ln V, from 0 to 1.

    >>> round(adaptive_weight(1.0, 0.25), 3)
    0.775
    """
    least = FLOOR * full
    return least + (full - least) * (1.0 - min(max(entropy, 0.0), 1.0))


class ByEntropy:
    """The weight of a step by the teacher's entropy over the steps before, about ten of them; the first has all of it.

    (Its gradient is 0 there: the student is the teacher.)
    """

    def __init__(self) -> None:
        self.entropy = RunningMean(HORIZON)

    def observe(self, measured: Observed) -> None:
        """Takes one step's entropy."""
        if measured.teacher_entropy is not None:
            self.entropy.add(measured.teacher_entropy)

    def weights(self, scheduled: Lambdas, full: Lambdas) -> Lambdas:
        """The schedule's weights with lambda_consistency by the formula."""
        return scheduled._replace(consistency=adaptive_weight(full.consistency, self.entropy.mean))

    def finding(self, *, ended: bool) -> str | None:
        """None: any entropy has its weight."""
        return None

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"entropy": self.entropy.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.entropy.load(state["entropy"])
