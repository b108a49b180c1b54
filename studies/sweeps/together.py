"""From runs to points: what each was, where it lies on the axis, what it reached."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from balora_plugin.report.runs import Run

AXES = ("rank", "learning_rate", "lambda_consistency")


@dataclass(frozen=True)
class Point:
    """The runs of one method at one place of the axis: their mean, and its spread over seeds (0 of one run)."""

    method: str
    x: float
    y: float
    spread: float
    runs: int


def method_of(run: Run) -> str:
    """Returns what was trained, DoRA told from LoRA."""
    path = None if run.adapter is None else run.adapter / "adapter_config.json"
    if path is not None and path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("use_dora"):
        return "dora"
    return run.method


def place_of(run: Run, axis: str) -> float | None:
    """Returns where a run lies on the axis; None where it does not say."""
    if axis == "rank":
        value = (run.settings.get("adapter") or {}).get("r")
    elif axis == "learning_rate":
        value = run.settings.get("learning_rate")
    else:
        value = getattr(run.terms, axis, None)
    return None if value is None else float(value)


def points(runs: Sequence[Run], axis: str, key: str, values: Mapping[str, float] | None = None) -> list[Point]:
    """Returns a point for each method and place, in order.

    Args:
        runs: Of one or several sweeps.
        axis: One of AXES.
        key: What was logged and is compared, `eval_loss` say; its last value counts.
        values: {a run's directory: figure} in the place of what was logged, such as accuracies of `balora eval`.

    Raises:
        ValueError: a run that does not say where it lies, or what it reached; names it.
    """
    given = {str(Path(path).resolve()): value for path, value in (values or {}).items()}
    found: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        x = place_of(run, axis)
        y = given.get(str(run.path)) if values is not None else run.last(key)
        if x is None:
            raise ValueError(f"{run.path} does not say its {axis}: leave it out, or take another --x.")
        if y is None:
            raise ValueError(f"{run.path} has no {key if values is None else 'value in --values'}: leave it out.")
        found.setdefault((method_of(run), x), []).append(y)
    return [
        Point(method, x, mean(reached), stdev(reached) if len(reached) > 1 else 0.0, len(reached))
        for (method, x), reached in sorted(found.items())
    ]


def table(found: Sequence[Point], axis: str, key: str, published: Mapping[str, float] | None = None) -> str:
    """Returns Markdown: a row a place, a column a method; the published values as a last row."""
    methods = sorted({point.method for point in found})
    lines = [f"{key}, mean over runs (± their standard deviation, where there are several)", ""]
    lines += [f"| {axis} | {' | '.join(methods)} |", "|" + "---|" * (len(methods) + 1)]
    at = {(point.method, point.x): point for point in found}
    for x in sorted({point.x for point in found}):
        cells = []
        for method in methods:
            point = at.get((method, x))
            several = f" ± {point.spread:.4f}" if point is not None and point.runs > 1 else ""
            cells.append("" if point is None else f"{point.y:.4f}{several}")
        lines.append(f"| {x:g} | {' | '.join(cells)} |")
    if published is not None:
        words = [f"{published[method]:g}" if method in published else "" for method in methods]
        lines.append(f"| published (LLaMA-2-7B, r 128) | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def draw(found: Sequence[Point], path: Path, axis: str, key: str, published: Mapping[str, float] | None = None) -> None:
    """Draws a line a method over the axis, which is logarithmic, and published values as broken lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for method in sorted({point.method for point in found}):
        own = [point for point in found if point.method == method]
        drawn = axes.errorbar(
            [p.x for p in own], [p.y for p in own], [p.spread for p in own], marker="o", capsize=3, label=method
        )
        if published is not None and method in published:
            axes.axhline(published[method], linestyle="--", color=drawn[0].get_color(), label=f"{method}, published")
    axes.set(xlabel=axis, ylabel=key, xscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
