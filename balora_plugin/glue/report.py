"""Results over seeds: the best learning rate of each grid, mean and standard deviation, as JSON and Markdown."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from .tasks import TASKS


def summary(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns an entry for each task and method: the learning rate whose mean first score is highest, and its scores.

    The rate is chosen on the very split that is reported, as is usual for GLUE, whose test labels are not public.
    """
    groups: dict[tuple[str, str], dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        job = record["job"]
        groups[job["task"], job["method"]][job["learning_rate"]].append(record)
    order = {name: index for index, name in enumerate(TASKS)}
    found = []
    for (task, method), rates in sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        first = TASKS[task].scores[0]
        split = TASKS[task].splits[0]
        best = max(rates, key=lambda rate: statistics.fmean(r["scores"][split][first] for r in rates[rate]))
        chosen = sorted(rates[best], key=lambda r: r["job"]["seed"])
        sets = {name: [r["scores"][name] for r in chosen] for name in TASKS[task].splits}
        shifted: dict[str, list[dict[str, float]]] = defaultdict(list)
        for record in chosen:
            for name, values in record["glue_x"].items():
                shifted[name].append({k: v for k, v in values.items() if k not in ("samples", "without_label")})
        found.append(
            {
                "task": task,
                "method": method,
                "model": chosen[0]["job"]["model"],
                "learning_rate": best,
                "learning_rates_tried": sorted(rates),
                "seeds": [r["job"]["seed"] for r in chosen],
                "scores": {name: _over_seeds(values) for name, values in sets.items()},
                "glue_x": {name: _over_seeds(values) for name, values in shifted.items()},
            }
        )
    return found


def _over_seeds(values: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Returns {score: its mean, and its standard deviation (n - 1) over at least two seeds}."""
    return {
        name: {
            "mean": statistics.fmean(v[name] for v in values),
            "std": statistics.stdev(v[name] for v in values) if len(values) > 1 else None,
        }
        for name in values[0]
    }


def markdown(entries: list[dict[str, Any]]) -> str:
    """Returns a table of the splits, one of GLUE-X where there is any, and each method's average over its tasks."""
    lines = ["| task | method | score | mean ± std | seeds | learning rate |", "|---|---|---|---|---|---|"]
    shifted = ["| trained on | method | tested on | score | mean ± std |", "|---|---|---|---|---|"]
    firsts: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        for split, scores in entry["scores"].items():
            where = entry["task"] if split == "validation" else f"{entry['task']} ({split.removeprefix('validation_')})"
            for name, value in scores.items():
                lines.append(
                    f"| {where} | {entry['method']} | {name} | {_shown(value)} | {len(entry['seeds'])} | "
                    f"{entry['learning_rate']:g} |"
                )
        task = TASKS[entry["task"]]
        firsts[entry["method"]].append(entry["scores"][task.splits[0]][task.scores[0]]["mean"])
        for name, scores in entry["glue_x"].items():
            for score, value in scores.items():
                shifted.append(f"| {entry['task']} | {entry['method']} | {name} | {score} | {_shown(value)} |")
    lines += [
        f"| average of {len(values)} | {method} | first scores | {statistics.fmean(values):.2f} | | |"
        for method, values in sorted(firsts.items())
    ]
    return "\n".join([*lines, *(["", *shifted] if len(shifted) > 2 else [])])


def _shown(value: dict[str, float | None]) -> str:
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ± {value['std']:.2f}")
