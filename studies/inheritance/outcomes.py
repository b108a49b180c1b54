"""How much of a fault is left, by method and seed, of (weighted) probes; and what the training cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..common.bootstrap import Weights
from ..common.records import Record
from .cells import COLOUR

Mean = Callable[[tuple[str, ...], str], np.ndarray]  # of sets and a quantity: per token (or name), by method and seed
TEXTS = ("majority", "minority")
TASK = ("task",)


@dataclass(frozen=True)
class Probe:
    """A quantity that the fault raises."""

    name: str
    value: Callable[[Mean], np.ndarray]


PROBES: dict[str, tuple[Probe, ...]] = {
    "noise": (
        Probe("loss on held-out texts", lambda mean: mean(TEXTS, "loss")),
        Probe("mass on unlikely tokens", lambda mean: mean(TEXTS, "mass")),
        Probe("mass on unlikely tokens, task", lambda mean: mean(TASK, "mass")),
        Probe("entropy", lambda mean: mean(TEXTS, "entropy")),
        Probe("under-confidence", lambda mean: -mean(TEXTS, "sure")),
    ),
    "imbalance": (
        Probe("loss, minority minus majority", lambda mean: mean(("minority",), "loss") - mean(("majority",), "loss")),
    ),
    COLOUR: (Probe("log-odds by group", lambda mean: mean(("first",), "odds") - mean(("second",), "odds")),),
}
COST = Probe("task loss", lambda mean: mean(TASK, "loss"))


class Runs:
    """Records of one fault as arrays [methods, seeds, items] by set and quantity; NaN where a run is missing."""

    def __init__(
        self, records: Sequence[Record], methods: Sequence[str], seeds: Sequence[int], tokens: dict[str, list[int]]
    ) -> None:
        self.tokens = {name: np.array(counts, dtype=float) for name, counts in tokens.items()}
        self.has = np.zeros((len(methods), len(seeds)), dtype=bool)
        self.sums: dict[tuple[str, str], np.ndarray] = {}
        for record in records:
            setting = record["setting"]
            if setting["method"] not in methods or setting["seed"] not in seeds:
                continue
            place = list(methods).index(setting["method"]), list(seeds).index(setting["seed"])
            self.has[place] = True
            for name, quantities in record["sets"].items():
                for quantity, sums in quantities.items():
                    shape = (*self.has.shape, len(sums))
                    self.sums.setdefault((name, quantity), np.full(shape, np.nan))[place] = sums

    def value(self, probe: Probe, weights: Weights | None = None) -> np.ndarray:
        """A probe [methods, seeds] of items that count so often each (by default once)."""

        def mean(names: tuple[str, ...], quantity: str) -> np.ndarray:
            total, count = np.zeros(self.has.shape), 0.0
            for name in names:
                times = np.ones(len(self.tokens[name])) if weights is None else weights[name].astype(float)
                total = total + self.sums[name, quantity] @ times
                count += float(self.tokens[name] @ times)
            return total / count

        return probe.value(mean) if self.sums else np.full(self.has.shape, np.nan)


@dataclass(frozen=True)
class Fault:
    """One fault: the runs that begin with it, those that begin clean, and both models before any fine-tuning.

    Of the larger model nothing is fine-tuned clean: `clean` is the original then, in every method and seed.
    """

    name: str
    faulty: Runs
    clean: Runs
    base: Runs
    clean_base: Runs

    def injected(self, probe: Probe) -> float:
        """What pre-training put in."""
        return float((self.base.value(probe) - self.clean_base.value(probe)).item())

    def left(self, probe: Probe, weights: Weights | None = None) -> np.ndarray:
        """What a fine-tuned model has of it more than one that began clean [methods, seeds]."""
        return self.faulty.value(probe, weights) - self.clean.value(probe, weights)

    def cost(self, weights: Weights | None = None) -> np.ndarray:
        """The task's loss [methods, seeds]."""
        return self.faulty.value(COST, weights)

    def counts(self) -> dict[str, int]:
        """How many items of each kind there are to draw."""
        return {name: len(counts) for name, counts in self.faulty.tokens.items()} | {"seeds": self.faulty.has.shape[1]}
