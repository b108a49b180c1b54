"""Each method minus LoRA and minus PiSSA, with intervals over test rows and seeds, by task and over the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..common.bootstrap import Interval, Weights, intervals, mean_of
from .outcomes import METRICS, Metric, Outcomes

REFERENCES = ("lora", "pissa")
ALL = "average"  # over the tasks that both methods have


@dataclass(frozen=True)
class Key:
    """What a difference is of."""

    task: str
    metric: Metric
    method: str
    reference: str


def differences(
    setting: str, tasks: Mapping[str, Outcomes], methods: Sequence[str], seeds: int, repeats: int
) -> dict[Key, Interval]:
    """All differences of a setting; paired: both sides see the same rows and seeds, those that both have."""
    keys = [
        Key(task, metric, method, reference)
        for task in (*tasks, ALL)
        for metric in METRICS[setting]
        for reference in REFERENCES
        for method in methods
    ]

    def statistic(weights: Weights) -> np.ndarray:
        by_task = []
        for task, outcomes in tasks.items():
            rows = []
            for metric in METRICS[setting]:
                found = outcomes.value(metric, weights[task])
                for reference in REFERENCES:
                    against = found[list(methods).index(reference)] if reference in methods else np.nan
                    rows.append(mean_of(found - against, weights["seeds"]))
            by_task.append(np.concatenate(rows))
        stacked = np.array(by_task)
        average = mean_of(stacked.T, np.ones(len(tasks)))
        return np.concatenate([*by_task, average])

    counts = {task: len(outcomes.gold) for task, outcomes in tasks.items()} | {"seeds": seeds}
    return dict(zip(keys, intervals(statistic, counts, repeats), strict=True))
