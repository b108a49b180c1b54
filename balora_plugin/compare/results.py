"""From the records of cells to tables: each method at each rate, the best rate of each, and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .plan import WITHOUT
from .statistics import LEVEL, Interval, limits, paired_difference, rows_of

MEASURES = {  # of a cell's last evaluation, in the order of the table
    "loss": "loss",
    "balora/drift": "drift",
    "accuracy": "acc.",
    "macro_f1": "F1",
    "pearson": "Pearson",
    "mean_token_accuracy": "token acc.",
}
NOTE = (
    "Held out, mean ± standard deviation over seeds: task loss, drift from the model before in nats; the norm of the "
    "first gradient; seconds of a run. *: the rate with a method's lowest loss; before: the model that "
    "training began with."
)
_PAIRED = {"loss": "loss", "drift": "drift"}


@dataclass(frozen=True)
class MethodAtRate:
    """A method at one learning rate: its records, one a seed; `best`: of its rates the one with the lowest loss."""

    method: str
    rate: float
    records: tuple[dict[str, Any], ...]
    best: bool

    def values(self, measure: str) -> list[float]:
        """Returns what its cells measured last."""
        return [float(each["final"][measure]) for each in self.records if measure in each["final"]]

    @property
    def loss(self) -> float:
        """Returns the mean held-out loss over seeds."""
        return float(np.mean(self.values("loss")))


@dataclass(frozen=True)
class BestDifference:
    """How a method at its best rate differs from the first method at its own."""

    method: str
    against: str
    measure: str
    interval: Interval

    @property
    def verdict(self) -> str:
        """Returns what can be said of it."""
        if not np.isfinite(self.interval.difference):
            return "no number"
        if not self.interval.told_apart:
            return "not told apart"
        return "lower" if self.interval.difference < 0 else "higher"


@dataclass(frozen=True)
class Results:
    """All of a comparison. `counts`: rows to train on, and held out; `limits`: what it cannot tell."""

    lines: list[MethodAtRate]
    differences: list[BestDifference]
    limits: list[str]
    counts: tuple[int, int]

    @property
    def best(self) -> list[MethodAtRate]:
        """Returns each method at its best rate."""
        return [line for line in self.lines if line.best]

    @property
    def before(self) -> list[dict[str, float]]:
        """Returns what was measured before the first step, one a seed: a classifier's new head is the seed's.

        Of the first method and rate, as no start changes it. Cells that earlier releases have trained do not hold it.
        """
        return [record["before"] for record in self.lines[0].records if "before" in record]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Returns the head and the rows of the table of methods and rates."""
        shown = {key: words for key, words in MEASURES.items() if any(line.values(key) for line in self.lines)}
        head = ["method", "rate", "seeds", *shown.values(), "first norm", "s"]
        rows = []
        if before := self.before:
            cells = [_spread([each[key] for each in before if key in each]) for key in shown]
            rows.append(["before", "-", str(len(before)), *cells, "-", "-"])
        for line in self.lines:
            norms = [each["first_gradient_norm"] for each in line.records if each["first_gradient_norm"] is not None]
            seconds = [each["seconds"] for each in line.records]
            cells = [_spread(line.values(key)) for key in shown]
            name = f"{line.method} *" if line.best else line.method
            rows.append([name, f"{line.rate:g}", str(len(line.records)), *cells, _spread(norms), _spread(seconds)])
        return head, rows

    def table_of_differences(self) -> tuple[list[str], list[list[str]]]:
        """Returns the head and the rows of the table of differences."""
        head = ["method", "against", "measure", "difference", f"{100 * LEVEL:.0f} % interval", ""]
        rows = []
        for each in self.differences:
            found = each.interval
            interval = f"{found.low:+.3g} to {found.high:+.3g}"
            rows.append([each.method, each.against, each.measure, f"{found.difference:+.4g}", interval, each.verdict])
        return head, rows

    def as_json(self) -> dict[str, Any]:
        """Returns everything, JSON-ready."""
        return {
            "rows": {"train": self.counts[0], "held_out": self.counts[1]},
            "cells": [dict(record) for line in self.lines for record in line.records],
            "before": self.before,
            "best": {line.method: line.rate for line in self.best},
            "differences": [
                {
                    "method": each.method,
                    "against": each.against,
                    "measure": each.measure,
                    "difference": each.interval.difference,
                    "low": each.interval.low,
                    "high": each.interval.high,
                    "verdict": each.verdict,
                }
                for each in self.differences
            ],
            "limits": self.limits,
        }

    def markdown(self) -> str:
        """Returns both tables and what they cannot tell, as Markdown."""
        parts = [_markdown(*self.table()), NOTE]
        if self.differences:
            parts.append(_markdown(*self.table_of_differences()))
        return "\n\n".join([*parts, *(f"- {each}" for each in self.limits)]) + "\n"


def results_of(records: Sequence[dict[str, Any]], counts: tuple[int, int]) -> Results:
    """Returns the results of cells, in the order in which methods and rates come."""
    grouped: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in records:
        grouped.setdefault((record["method"], record["learning_rate"]), []).append(record)
    lines = [MethodAtRate(method, rate, tuple(each), False) for (method, rate), each in grouped.items()]
    chosen = {method: _best([line for line in lines if line.method == method]) for method, _ in grouped}
    lines = [MethodAtRate(line.method, line.rate, line.records, line.rate == chosen[line.method]) for line in lines]
    first, *others = [line for line in lines if line.best]
    found = [difference for other in others for difference in _differences(first, other)]
    by_method = {line.method: line for line in (first, *others)}
    for method, plain in WITHOUT.items():  # what the terms do: against the same start without them
        if method in by_method and plain in by_method and first.method not in (method, plain):
            found += _differences(by_method[plain], by_method[method])
    intervals = [each.interval for each in found if each.measure == _PAIRED["loss"]]
    said = limits(counts[1], len(first.records), intervals)
    if len(lines) > len(chosen):
        said.append("The learning rate was chosen by the same held-out rows, which flatters every method a little.")
    said += _edges(lines)
    return Results(lines, found, said, counts)


def _edges(lines: Sequence[MethodAtRate]) -> list[str]:
    """Says which best rates are the lowest or the highest of their method's: beyond them nothing was tried."""
    at_edge = []
    for best in (line for line in lines if line.best and np.isfinite(line.loss)):
        rates = [line.rate for line in lines if line.method == best.method]
        if len(rates) > 1 and best.rate in (min(rates), max(rates)):
            end = "lowest" if best.rate == min(rates) else "highest"
            at_edge.append(f"{best.method} {best.rate:g} (the {end})")
    if not at_edge:
        return []
    return [f"At the edge of the rates that were tried: {', '.join(at_edge)}. One beyond may do better (--rates)."]


def _best(lines: Sequence[MethodAtRate]) -> float:
    """The rate with the lowest loss; one that diverged never wins where another did not."""
    return min(lines, key=lambda line: line.loss if np.isfinite(line.loss) else np.inf).rate


def _differences(first: MethodAtRate, other: MethodAtRate) -> list[BestDifference]:
    found = []
    for measure, words in _PAIRED.items():
        one, two = rows_of(first.records, measure), rows_of(other.records, measure)
        if one is not None and two is not None:
            found.append(BestDifference(other.method, first.method, words, paired_difference(one, two)))
    return found


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.4g}"
    return f"{mean} ± {np.std(values, ddof=1):.1g}" if len(values) > 1 else mean


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
