"""Paired bootstrap intervals: documents and seeds are drawn anew, the same ones for both sides of a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

REPEATS = 1000
LEVEL = 0.95
Weights = Mapping[str, np.ndarray]  # by kind of item how often each one counts


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its bootstrap interval (percentiles)."""

    value: float
    low: float
    high: float

    def leaves_out_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0

    def text(self, decimals: int = 3) -> str:
        """Value and ends with their signs, and a star where 0 lies outside."""
        if np.isnan(self.value):
            return "-"
        star = " *" if self.leaves_out_zero() else ""
        return f"{self.value:+.{decimals}f} [{self.low:+.{decimals}f}, {self.high:+.{decimals}f}]{star}"


def draws(counts: Mapping[str, int], repeats: int = REPEATS, seed: int = 0) -> Iterator[Weights]:
    """How often each item is drawn, by kind (documents of one set, seeds); the same for the same arguments."""
    generator = np.random.default_rng(seed)
    for _ in range(repeats):
        yield {
            kind: np.bincount(generator.integers(count, size=count), minlength=count) for kind, count in counts.items()
        }


def intervals(
    statistic: Callable[[Weights], np.ndarray], counts: Mapping[str, int], repeats: int = REPEATS
) -> list[Interval]:
    """The statistics [k] of all items, each with its interval; items of different kinds are drawn independently.

    A difference of two methods on the same items is paired by this: both see the same draw. A draw in which a statistic
    is NaN does not count for it.
    """
    whole = statistic({kind: np.ones(count, dtype=int) for kind, count in counts.items()})
    found = np.array([statistic(weights) for weights in draws(counts, repeats)])
    tail = 50 * (1 - LEVEL)
    made = []
    for value, column in zip(whole, found.T, strict=True):
        seen = column[~np.isnan(column)]
        low, high = np.percentile(seen, [tail, 100 - tail]) if len(seen) else (np.nan, np.nan)
        made.append(Interval(float(value), float(low), float(high)))
    return made


def paired_mean(differences: np.ndarray, repeats: int = REPEATS) -> Interval:
    """Mean of differences by item (by seed, say) [n], with its interval."""
    values = np.asarray(differences, dtype=float)
    found = intervals(lambda w: np.array([np.average(values, weights=w["items"])]), {"items": len(values)}, repeats)
    return found[0]


def mean_of(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Means over seeds [methods] that count so often, of those without NaN; NaN where none is left."""
    known = ~np.isnan(values) * times
    total = known.sum(axis=-1)
    sums = (np.nan_to_num(values) * known).sum(axis=-1)
    return np.divide(sums, total, out=np.full(total.shape, np.nan), where=total > 0)
