"""The measured points of all runs as arrays: by point, seed and document, NaN where a run is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..common.bootstrap import Weights
from ..common.records import Record

SETS = ("task", "documentation", "instructions")


@dataclass(frozen=True)
class Point:
    """A method after so many steps, its adapter scaled."""

    method: str
    step: int
    scale: float

    def text(self) -> str:
        """Its name in tables."""
        return f"{self.method}, {self.step} steps" + ("" if self.scale == 1 else f", x {self.scale:g}")


@dataclass(frozen=True)
class Axis:
    """A quantity of a point, to be low: `what` it is, of which set, and its column in the tables."""

    name: str
    of: str
    what: str
    decimals: int = 3


COST = Axis("task loss", "task", "loss")
AXES = (
    Axis("drift, task", "task", "drift"),
    Axis("drift, instructions", "instructions", "drift"),
    Axis("drift, documentation", "documentation", "drift"),
    Axis("loss, instructions", "instructions", "loss"),
    Axis("loss, documentation", "documentation", "loss"),
    Axis("CrowS %", "crows", "crows", 1),
)


class Points:
    """All points of the records. `seeds` in order; `base` is the pre-trained model's own record of each axis."""

    def __init__(self, records: Sequence[Record], base: Record) -> None:
        self.seeds = sorted({record["setting"]["seed"] for record in records})
        found: dict[Point, dict[int, Record]] = {}
        for record in records:
            for measured in record["points"]:
                point = Point(record["setting"]["method"], measured["step"], measured["scale"])
                found.setdefault(point, {})[record["setting"]["seed"]] = measured
        self.points = list(found)
        self.base = base["points"][0]
        self.tokens = {name: np.array(counts, dtype=float) for name, counts in base["tokens"].items()}
        self.has = np.array([[seed in found[point] for seed in self.seeds] for point in self.points])
        self._values = {axis: self._array(found, axis) for axis in (COST, *AXES)}

    def counts(self) -> dict[str, int]:
        """How many items of each kind there are to draw: documents by set, pairs, seeds."""
        sizes = {name: len(tokens) for name, tokens in self.tokens.items()}
        return sizes | {"crows": len(self.base["crows"]), "seeds": len(self.seeds)}

    def _array(self, found: dict[Point, dict[int, Record]], axis: Axis) -> np.ndarray:
        size = len(_of(self.base, axis))
        values = np.full((len(self.points), len(self.seeds), size), np.nan)
        for place, point in enumerate(self.points):
            for column, seed in enumerate(self.seeds):
                row = _of(found[point].get(seed, {}), axis)
                if len(row):
                    values[place, column] = row
        return values

    def by_seed(self, axis: Axis, weights: Weights | None = None) -> np.ndarray:
        """Means over the (weighted) documents [points, seeds], per counted token or in per cent of the pairs."""
        return self._mean(self._values[axis], axis, weights)

    def of_base(self, axis: Axis) -> float:
        """The pre-trained model's."""
        return float(self._mean(_of(self.base, axis), axis, None))

    def _mean(self, values: np.ndarray, axis: Axis, weights: Weights | None) -> np.ndarray:
        times = np.ones(values.shape[-1]) if weights is None else weights[axis.of]
        if axis.of == "crows":
            return 100 * (values @ times) / times.sum()
        return (values @ times) / (self.tokens[axis.of] @ times)

    def means(self, axis: Axis, weights: Weights | None = None, allowed: np.ndarray | None = None) -> np.ndarray:
        """Means over documents and seeds [points]; `allowed` [seeds] leaves seeds out. NaN where nothing is left."""
        by_seed = self.by_seed(axis, weights)
        times = np.ones(len(self.seeds)) if weights is None else weights["seeds"].astype(float)
        share = ~np.isnan(by_seed) * times * (1 if allowed is None else allowed)
        total = share.sum(axis=1)
        sums = (np.nan_to_num(by_seed) * share).sum(axis=1)
        return np.divide(sums, total, out=np.full(len(total), np.nan), where=total > 0)


def _of(measured: Record, axis: Axis) -> np.ndarray:
    """An axis of one measured point by document; empty where it was not measured. CrowS: 1 where it stereotypes."""
    if axis.of not in measured:
        return np.array([])
    if axis.of == "crows":
        return (np.array(measured["crows"]) > 0).astype(float)
    return np.array(measured[axis.of][axis.what], dtype=float)
