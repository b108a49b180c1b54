"""Draws docs/images/drift.svg from the runs of the study: `python -m studies.forgetting.picture`.

A point is a method after so many steps: its loss on the task, and how far its predictions there have moved.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from ..common import records
from .cells import METHODS
from .points import AXES, COST, Point, Points

RUNS = Path(__file__).parent / "runs"
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "drift.svg"
INK = "#78808a"  # to be read on white and on black
COLOURS = ("#2f81f7", "#d9730d", "#1a9e77", "#bf4bdb", "#d1372c", "#8a7d00")
STARTS = {True: "LoRA", "pissa": "PiSSA"}


def words(method: str) -> str:
    """A method's label."""
    setting = METHODS[method]
    start, terms = STARTS[setting.start], setting.terms
    if setting.is_rival:
        return f"{start}, rate {setting.rate:g}" + (f", decay {setting.decay:g}" if setting.decay else "")
    if "preset" in terms:
        return f"{start} + preset {terms['preset']}"
    if "drift_target" in terms:
        return f"{start} + drift_target {terms['drift_target']:g}"
    named = {"lambda_consistency": "consistency", "lambda_diversity": "diversity", "lambda_svd": "svd"}
    return f"{start} + " + ", ".join(f"{word} {terms[key]:g}" for key, word in named.items() if terms.get(key))


def curves(points: Points) -> dict[str, list[tuple[Point, float, float]]]:
    """By method its points as (point, drift on the task, task loss): unscaled by step, then scaled down."""
    drift, loss = (points.means(axis) for axis in (AXES[0], COST))
    found: dict[str, list[tuple[Point, float, float]]] = {}
    for place in sorted(range(len(points.points)), key=lambda p: (-points.points[p].scale, points.points[p].step)):
        point = points.points[place]
        found.setdefault(point.method, []).append((point, float(drift[place]), float(loss[place])))
    return {name: found[name] for name in METHODS if name in found}


def draw(points: Points, path: Path) -> None:
    """Writes the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "drift", "font.size": 11, "text.color": INK}
    style |= {f"{part}.color": INK for part in ("xtick", "ytick")} | {"axes.edgecolor": INK, "axes.labelcolor": INK}
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        start = (0.0, points.of_base(COST))
        axes.annotate("pre-trained", start, (10, 4), textcoords="offset points")
        colours = cycle(COLOURS)
        for method, found in curves(points).items():
            _one(axes, start, method, found, INK if METHODS[method].is_rival else next(colours))
        axes.plot(*start, "D", color=INK)
        axes.set_xlabel("drift on the task: nats per token from the pre-trained model")
        axes.set_ylabel("task loss: nats per token")
        axes.set_xlim(left=-0.02)
        axes.legend(frameon=False, labelcolor="linecolor", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasSVG(figure)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def _one(
    axes: Any, start: tuple[float, float], method: str, found: list[tuple[Point, float, float]], colour: str
) -> None:
    """A method's line over its steps; of a rival hollow marks where its adapter was scaled down afterwards."""
    whole = [start, *((drift, loss) for point, drift, loss in found if point.scale == 1)]
    scaled = [(drift, loss) for point, drift, loss in found if point.scale != 1]
    line = "--" if METHODS[method].is_rival else "-"
    axes.plot(*zip(*whole, strict=True), line, marker="o", color=colour, label=words(method))
    if scaled:
        label = f"{words(method)}, scaled down"
        axes.plot(*zip(*scaled, strict=True), "o", color=colour, fillstyle="none", label=label)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws; an argument is another place to write to."""
    found = records.read(RUNS)
    base = next(record for record in found if record["cell"] == "base")
    runs = [record for record in found if record["cell"] != "base"]
    path = Path(next(iter(sys.argv[1:] if arguments is None else arguments), PICTURE))
    draw(Points(runs, base), path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
