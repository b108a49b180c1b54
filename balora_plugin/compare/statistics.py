"""What held-out rows and seeds say of a difference between two methods: a paired bootstrap. numpy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 4000
LEVEL = 0.95
FEW_ROWS = 30  # of a bootstrap over fewer the intervals come out too narrow


@dataclass(frozen=True)
class RowSums:
    """Sums of a measure over each held-out row, and what they are divided by: (seeds, rows) each."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def mean(self) -> float:
        """Returns the mean over everything that counts, the seeds' means averaged."""
        return float(_mean(self.sums, self.counts))


@dataclass(frozen=True)
class Interval:
    """A difference of means, and its bootstrap interval."""

    difference: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        """Returns whether the interval leaves 0 out; one that is no number does not."""
        return self.low > 0.0 or self.high < 0.0


def paired_difference(one: RowSums, other: RowSums, *, seed: int = 0) -> Interval:
    """Returns other - one: rows, and seeds where there are several, are drawn anew, the same ones for both.

    Raises:
        ValueError: they are not over the same rows and the same number of seeds.
    """
    if one.sums.shape != other.sums.shape:
        raise ValueError(f"rows {one.sums.shape} and {other.sums.shape} are no pairs: run both over the same.")
    generator = np.random.default_rng(seed)
    seeds, rows = one.sums.shape
    found = np.empty(DRAWS)
    for place in range(DRAWS):
        drawn = np.ix_(generator.integers(seeds, size=seeds), generator.integers(rows, size=rows))
        found[place] = _mean(other.sums[drawn], other.counts[drawn]) - _mean(one.sums[drawn], one.counts[drawn])
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(found, [tail, 1 - tail])
    return Interval(other.mean - one.mean, float(low), float(high))


def _mean(sums: np.ndarray, counts: np.ndarray) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.mean(sums.sum(axis=1) / counts.sum(axis=1))


def rows_of(records: Sequence[Mapping[str, Any]], measure: str) -> RowSums | None:
    """Returns a measure of cells that differ by seed alone; None where they have none."""
    if not records or any(measure not in record["rows"] for record in records):
        return None
    sums = np.asarray([record["rows"][measure] for record in records], dtype=float)
    return RowSums(sums, np.asarray([record["rows"]["count"] for record in records], dtype=float))


def limits(held_out: int, seeds: int, intervals: Sequence[Interval]) -> list[str]:
    """Returns what so few rows and seeds cannot tell, in sentences."""
    said = []
    if held_out < FEW_ROWS:
        said.append(
            f"{held_out} held-out row{'s' * (held_out != 1)}: intervals over so few come out too narrow, and other "
            "rows of the same kind may order the methods otherwise. Nothing here says how they do on other data."
        )
    if seeds == 1:
        said.append("One seed: intervals are over held-out rows alone; how far another seed moves them is not known.")
    elif seeds < 5:
        said.append(f"{seeds} seeds: what they move is known roughly; a bootstrap of so few is on the narrow side.")
    widths = [(each.high - each.low) / 2 for each in intervals if np.isfinite(each.difference)]
    if len(widths) < len(intervals):
        said.append("A run diverged: its loss is no number, and nothing is said of its differences.")
    if widths:
        widest = max(widths)
        said.append(f"Differences of held-out loss below about {widest:.2g} are not told apart here.")
    return said
