"""Figures of one model or two, from values a document: how they become one number, and its standard error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 500  # of the documents, for figures that are neither a mean nor a ratio of sums
_SEED = 1234

Influence = Callable[[Sequence[Any]], np.ndarray]


@dataclass(frozen=True)
class Aggregate:
    """How values a document become one number.

    `influence`: how far each document pulls that number, times their count; its spread gives the standard error. None:
    the error is that of resampled documents.
    """

    value: Callable[[Sequence[Any]], float]
    influence: Influence | None = None


def mean_of(values: Sequence[Any]) -> float:
    """Returns the mean."""
    return float(np.mean(np.asarray(values, dtype=np.float64)))


def ratio_of(values: Sequence[Any]) -> float:
    """Returns the sum of the first over the sum of the second of pairs (sum, count); NaN where nothing was counted."""
    total, count = np.asarray(values, dtype=np.float64).sum(axis=0)
    return float(total / count) if count else float("nan")


def _mean_influence(values: Sequence[Any]) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    return numbers - numbers.mean()


def _ratio_influence(values: Sequence[Any]) -> np.ndarray:
    pairs = np.asarray(values, dtype=np.float64)
    count = pairs[:, 1].mean()
    if not count:
        return np.full(len(pairs), np.nan)
    return (pairs[:, 0] - ratio_of(values) * pairs[:, 1]) / count


MEAN = Aggregate(mean_of, _mean_influence)
RATIO = Aggregate(ratio_of, _ratio_influence)


@dataclass(frozen=True)
class Figure:
    """One measured figure; `values`: of each side (base, adapter ...) one a document, in the same order.

    `better`: whether a higher number is a better one; None where neither is.
    """

    task: str
    name: str
    values: Mapping[str, Sequence[Any]]
    aggregate: Aggregate = MEAN
    better: bool | None = None

    @property
    def documents(self) -> int:
        """Returns how many documents it is measured on."""
        return len(next(iter(self.values.values())))


@dataclass(frozen=True)
class Measured:
    """A number and its standard error; None of fewer than two documents."""

    value: float
    error: float | None

    def as_json(self) -> dict[str, float | None]:
        """Returns it for a file; what is no number is null."""
        finite = [None if x is None or not np.isfinite(x) else x for x in (self.value, self.error)]
        return {"value": finite[0], "stderr": finite[1]}


def measured(figure: Figure, side: str) -> Measured:
    """Returns the figure of one side."""
    values = figure.values[side]
    if figure.documents < 2:
        return Measured(figure.aggregate.value(values), None)
    if figure.aggregate.influence is not None:
        return Measured(figure.aggregate.value(values), _error(figure.aggregate.influence(values)))
    return Measured(figure.aggregate.value(values), float(np.std(_resampled(figure, side), ddof=1)))


def difference(figure: Figure, base: str, other: str) -> Measured:
    """Returns the figure of `other` minus that of `base`, with the error of the difference, paired by document."""
    one, two = figure.values[base], figure.values[other]
    value = figure.aggregate.value(two) - figure.aggregate.value(one)
    if figure.documents < 2:
        return Measured(value, None)
    if figure.aggregate.influence is not None:
        return Measured(value, _error(figure.aggregate.influence(two) - figure.aggregate.influence(one)))
    return Measured(value, float(np.std(_resampled(figure, other) - _resampled(figure, base), ddof=1)))


def _error(influence: np.ndarray) -> float:
    return float(np.std(influence, ddof=1) / np.sqrt(len(influence)))


def _resampled(figure: Figure, side: str) -> np.ndarray:
    """Returns the figure of one side on resampled documents; of every side on the same ones."""
    draw = np.random.default_rng(_SEED)
    values = figure.values[side]
    found = []
    for _ in range(RESAMPLES):
        chosen = draw.integers(0, len(values), len(values))
        found.append(figure.aggregate.value([values[i] for i in chosen]))
    return np.asarray(found)
