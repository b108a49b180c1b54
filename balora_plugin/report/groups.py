"""Runs of the same settings, which seeds alone tell apart, and how groups differ with intervals over their seeds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .runs import SEED_IN_NAME, Run

LEVEL = 0.95
_ORDER = ("lora", "pissa", "full", "adapter", "lora_terms", "ba_lora")
MEASURES = {  # what an evaluation logs last: its key, in words, whether less is better (None: neither)
    "eval_loss": ("held-out task loss", True),
    "eval_balora/drift": ("drift, nats", None),
    "eval_accuracy": ("accuracy", False),
    "eval_macro_f1": ("macro-F1", False),
    "eval_mean_token_accuracy": ("token accuracy", False),
    "eval_balora/entropy": ("entropy, nats", None),
}


@dataclass(frozen=True)
class Group:
    """Runs of the same settings. `label`: the method, and what of the settings tells the groups apart."""

    label: str
    runs: tuple[Run, ...]

    def values(self, key: str) -> list[tuple[int | None, float]]:
        """Returns (seed, what was logged last by this key) of the runs that logged it."""
        return [(run.seed, value) for run in self.runs if (value := run.last(key)) is not None]


@dataclass(frozen=True)
class GroupDifference:
    """How a group differs from the first one in a measure: mean, and the interval over seeds where there are several.

    `paired`: the same seeds in both, so that each run is compared with its twin. `seeds`: the smaller number of both.
    """

    label: str
    measure: str
    mean: float
    low: float | None
    high: float | None
    paired: bool
    seeds: int
    less_is_better: bool | None

    @property
    def verdict(self) -> str:
        """Returns what can be said of it, in words."""
        if not math.isfinite(self.mean):
            return "no number"
        if self.low is None or self.high is None:
            return "one seed: no interval"
        if self.low <= 0.0 <= self.high:
            return "not told apart"
        if self.less_is_better is None:
            return "lower" if self.mean < 0 else "higher"
        return "better" if (self.mean < 0) == self.less_is_better else "worse"


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Returns the groups by method, the baselines first; of one method in the order of their first runs."""
    bases: dict[str, set[str | None]] = {}
    for run in runs:
        bases.setdefault(_key(run), set()).update({run.base} - {None})
    found: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        key = _key(run)
        found.setdefault((key, run.base if len(bases[key]) > 1 else None), []).append(run)
    members = sorted(found.values(), key=lambda group: _ORDER.index(group[0].method))
    labels = [members_of[0].method for members_of in members]
    for name in _telling(members):
        if len(set(labels)) == len(labels):
            break
        labels = [
            f"{label}, {_said(name, _fact(group[0], name))}" for label, group in zip(labels, members, strict=True)
        ]
    if len(set(labels)) < len(labels):
        labels = [group[0].name for group in members]
    return [Group(label, tuple(group)) for label, group in zip(labels, members, strict=True)]


def differences(groups: Sequence[Group]) -> list[GroupDifference]:
    """Returns how each later group differs from the first one, in every measure that both logged."""
    found = []
    for key, (name, less) in MEASURES.items():
        first = groups[0].values(key)
        for other in groups[1:]:
            theirs = other.values(key)
            if first and theirs:
                found.append(_difference(other.label, name, first, theirs, less))
    return found


def _difference(
    label: str,
    measure: str,
    first: Sequence[tuple[int | None, float]],
    other: Sequence[tuple[int | None, float]],
    less: bool | None,
) -> GroupDifference:
    from scipy import stats

    ones, others = dict(first), dict(other)
    shared = [seed for seed in ones if seed in others and seed is not None]
    paired = len(shared) == len(first) == len(other)
    a = [ones[seed] for seed in shared] if paired else [value for _, value in first]
    b = [others[seed] for seed in shared] if paired else [value for _, value in other]
    mean = sum(b) / len(b) - sum(a) / len(a)
    low = high = None
    if min(len(a), len(b)) > 1:
        test = stats.ttest_rel(b, a) if paired else stats.ttest_ind(b, a, equal_var=False)
        interval = test.confidence_interval(LEVEL)
        low, high = float(interval.low), float(interval.high)
        if low != low:  # no spread at all: equal runs
            low = high = mean
    return GroupDifference(label, measure, mean, low, high, paired, min(len(a), len(b)), less)


def _facts(run: Run) -> dict[str, Any]:
    """What of a run moves its result, flat, but for its seed."""
    facts: dict[str, Any] = {key: value for key, value in run.settings.items() if key not in ("seed", "adapter")}
    facts |= {f"adapter {key}": value for key, value in (run.settings.get("adapter") or {}).items()}
    if run.terms is not None:
        facts |= dataclasses.asdict(run.terms)
    return {**facts, "steps": run.steps}


def _key(run: Run) -> str:
    if "seed" not in run.settings:  # no record of its own: its name says what it is, its seed apart
        return SEED_IN_NAME.sub("", run.name)
    return json.dumps([run.method, _facts(run)], sort_keys=True, default=str)


def _fact(run: Run, name: str) -> Any:
    return run.base if name == "base" else _facts(run).get(name)


def _telling(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Names of the settings in which groups of one method differ, the usual ones first."""
    usual = ["learning_rate", "adapter r", "lambda_consistency", "lambda_diversity", "lambda_svd", "steps", "base"]
    names = [*usual, *sorted({name for group in groups for name in _facts(group[0])} - set(usual))]
    telling = []
    for name in names:
        by_method: dict[str, set[str]] = {}
        for group in groups:
            by_method.setdefault(group[0].method, set()).add(str(_fact(group[0], name)))
        if any(len(values) > 1 for values in by_method.values()):
            telling.append(name)
    return telling


def _said(name: str, value: Any) -> str:
    short = {"learning_rate": "lr", "adapter r": "r"}.get(name, name)
    return f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}"
