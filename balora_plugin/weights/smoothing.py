"""The running mean that the rules share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RunningMean:
    """An exponential mean over about `horizon` observations, without the pull of a start at 0.

    After x_1 ... x_n it is sum b^(n - i) x_i / sum b^(n - i) with b = 1 - 1 / horizon.

    Attributes:
        horizon: At least 1; 1: the last observation alone.
        total, weight: The two sums, times 1 / horizon.
    """

    horizon: float
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        """Takes one observation; returns the mean."""
        new = 1.0 / self.horizon
        self.total += new * (value - self.total)
        self.weight += new * (1.0 - self.weight)
        return self.mean

    @property
    def mean(self) -> float:
        """The mean; 0 before anything was observed."""
        return self.total / self.weight if self.weight else 0.0

    def state(self) -> list[float]:
        """The two sums."""
        return [self.total, self.weight]

    def load(self, state: list[float]) -> None:
        """Goes on from what `state` gave."""
        self.total, self.weight = state
