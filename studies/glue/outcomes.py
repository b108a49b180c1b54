"""The runs of one task and setting as arrays, and the scores of (weighted) test rows, by method and seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.records import Record


@dataclass(frozen=True)
class Metric:
    """A quantity of the tables: its name, factor and decimals; `higher`: whether more of it is better."""

    name: str
    factor: float = 100.0
    decimals: int = 1
    higher: bool | None = True


SCORE = Metric("GLUE's score")
AUC = Metric("AUC")
MINORITY = Metric("minority recall")
BALANCED = Metric("balanced accuracy")
DRIFT = Metric("drift", 1.0, 3, None)
FEATURES = Metric("feature drift", 1.0, 3, None)
EVERYWHERE = (SCORE, AUC, DRIFT, FEATURES)
METRICS = {"clean": EVERYWHERE, "noise": EVERYWHERE, "imbalance": (SCORE, AUC, MINORITY, BALANCED, DRIFT, FEATURES)}


class Outcomes:
    """Runs of one task and setting. `methods` in the given order, `seeds` by number; a missing run is NaN in both.

    `truth`: the task's entry of the record `data`. All tasks have two classes.
    """

    def __init__(self, records: Sequence[Record], methods: Sequence[str], seeds: Sequence[int], truth: Any) -> None:
        self.gold = np.array(truth["gold"])
        self.minority, self.score_name = truth["minority"], truth["score"]
        shape = (len(methods), len(seeds))
        self.has = np.zeros(shape, dtype=bool)
        self.margin = np.full((*shape, len(self.gold)), np.nan)
        self.drift = np.full((*shape, len(self.gold)), np.nan)
        self.features = np.full(shape, np.nan)
        for record in records:
            setting = record["setting"]
            if setting["method"] not in methods or setting["seed"] not in seeds:
                continue
            place = methods.index(setting["method"]), list(seeds).index(setting["seed"])
            logits = np.array(record["logits"])
            self.has[place] = True
            self.margin[place] = logits[:, 1] - logits[:, 0]
            self.drift[place] = record["drift"]
            self.features[place] = record["feature_drift"]
        self.said = (self.margin > 0).astype(int)
        self._above = self._pairs()

    def _pairs(self) -> np.ndarray:
        """[methods, seeds, positives, negatives]: 1 where the positive has the larger margin, 1/2 where they tie."""
        positive, negative = (self.margin[..., self.gold == label] for label in (1, 0))
        difference = positive[..., :, None] - negative[..., None, :]
        return ((np.sign(difference) + 1) / 2).astype(np.float32)

    def value(self, metric: Metric, weights: np.ndarray | None = None) -> np.ndarray:
        """A metric [methods, seeds] of test rows that count so often each (by default once); NaN without a run."""
        times = np.ones(len(self.gold)) if weights is None else np.asarray(weights, dtype=float)
        found = _VALUES[metric](self, times)
        return metric.factor * np.where(self.has, found, np.nan)

    def of_majority(self) -> float:
        """GLUE's score, in per cent, of always saying the commonest class of the test rows."""
        return 0.0 if self.score_name == "matthews" else 100 * float(np.bincount(self.gold).max() / len(self.gold))

    def score(self, times: np.ndarray) -> np.ndarray:
        """Accuracy, or Matthews' correlation: 0 with a constant."""
        if self.score_name != "matthews":
            return (self.said == self.gold) @ times / times.sum()
        true, false = (self._rate(1, label, times) * times[self.gold == label].sum() for label in (1, 0))
        said, gold, total = true + false, times[self.gold == 1].sum(), times.sum()
        spread = np.sqrt(said * (total - said) * gold * (total - gold))
        return np.divide(true * total - said * gold, spread, out=np.zeros_like(spread), where=spread > 0)

    def _rate(self, said: int, label: int, times: np.ndarray) -> np.ndarray:
        """How often the rows of a class are said to be of a class."""
        of_label = self.gold == label
        return (self.said[..., of_label] == said) @ times[of_label] / times[of_label].sum()

    def recall(self, times: np.ndarray) -> np.ndarray:
        """Recall of the class that is made rare."""
        return self._rate(self.minority, self.minority, times)

    def balanced(self, times: np.ndarray) -> np.ndarray:
        """Mean of both classes' recalls."""
        return (self._rate(0, 0, times) + self._rate(1, 1, times)) / 2

    def area(self, times: np.ndarray) -> np.ndarray:
        """How often a row of class 1 has more of class 1's logit than one of class 0."""
        positive, negative = times[self.gold == 1], times[self.gold == 0]
        return (self._above @ negative.astype(np.float32)) @ positive / (positive.sum() * negative.sum())


_VALUES: Mapping[Metric, Callable[[Outcomes, np.ndarray], np.ndarray]] = {
    SCORE: Outcomes.score,
    AUC: Outcomes.area,
    MINORITY: Outcomes.recall,
    BALANCED: Outcomes.balanced,
    DRIFT: lambda outcomes, times: outcomes.drift @ times / times.sum(),
    FEATURES: lambda outcomes, _: outcomes.features,
}
