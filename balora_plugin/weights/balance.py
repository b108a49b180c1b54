"""`balance`: weights at which each term's gradient has a given share of the task's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..schedules import Lambdas
from .observed import Observed
from .smoothing import RunningMean

LOWEST, HIGHEST = 1e-6, 1e6  # bounds of the weights
HORIZON = 2.0  # measurements: they are many steps apart, and a term's gradient grows while the student moves


class HeldShares:
    """Holds the share of each named term.

    A share is proportional to its weight, so with c_i the i-th measured share at a weight of 1 the weight is

        target / exp(running mean of log c_i), within 1e-6 ... 1e6

    which is the fixed point itself after one measurement. A term that did not act (c = 0) keeps its weight.

    Args:
        targets: {term: share of the task's gradient}.
        start: The configured weights, until something is measured.
    """

    def __init__(self, targets: Mapping[str, float], start: Lambdas) -> None:
        self.targets = dict(targets)
        self._own = {name: getattr(start, name) for name in self.targets}
        self._logs = {name: RunningMean(HORIZON) for name in self.targets}

    def observe(self, measured: Observed) -> None:
        """Takes the shares of one step."""
        for name, share in (measured.shares or {}).items():
            if name in self.targets and share > 0.0:
                unit = math.exp(self._logs[name].add(math.log(share)))
                self._own[name] = min(max(self.targets[name] / unit, LOWEST), HIGHEST)

    def unmeasured(self, scheduled: Lambdas) -> bool:
        """Whether a term acts now that was never measured."""
        return any(getattr(scheduled, name) and not self._logs[name].weight for name in self.targets)

    def weights(self, scheduled: Lambdas, full: Lambdas) -> Lambdas:
        """The balanced weights, each times what the schedule leaves of the configured one."""
        left = {name: getattr(scheduled, name) / getattr(full, name) for name in self.targets}
        return scheduled._replace(**{name: self._own[name] * left[name] for name in self.targets})

    def finding(self, *, ended: bool) -> str | None:
        """Says which share no weight within the bounds gives; None where there is none."""
        for name, weight in self._own.items():
            if self._logs[name].weight and weight in (LOWEST, HIGHEST):
                reached = weight * math.exp(self._logs[name].mean)
                return (
                    f"balance.{name}={self.targets[name]:g} cannot be held: lambda_{name} is at its bound {weight:g}, "
                    f"where the share is {reached:.2g}. Write balance.{name}={reached:.2g}, or leave it out."
                )
        return None

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {name: [self._own[name], self._logs[name].state()] for name in self.targets}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave; a term that it does not name starts anew."""
        for name in self.targets:
            if name in state:
                self._own[name] = state[name][0]
                self._logs[name].load(state[name][1])
