"""Draws docs/images/drift.svg from the runs of the study: `python -m studies.forgetting.picture`.

A point is a method after so many steps: its loss on the task, and how far its predictions there have moved, means over
the seeds that there are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ..common import records
from ..common.fronts import front
from .cells import METHODS
from .points import AXES, COST, Points

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


def curves(points: Points) -> dict[str, list[tuple[float, float]]]:
    """By method its points as (drift on the task, task loss), by step, then scaled down."""
    drift, loss = (points.means(axis) for axis in (AXES[0], COST))
    found: dict[str, list[tuple[float, float]]] = {}
    for place in sorted(range(len(points.points)), key=lambda p: (-points.points[p].scale, points.points[p].step)):
        found.setdefault(points.points[place].method, []).append((float(drift[place]), float(loss[place])))
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
        found = curves(points)
        _rivals(axes, [name for name in found if METHODS[name].is_rival], found)
        colours = cycle(COLOURS)
        for method in (name for name in found if not METHODS[name].is_rival):
            axes.plot(*zip(*found[method], strict=True), "-o", color=next(colours), label=words(method))
        axes.set_xlabel("drift on the task: nats per token from the pre-trained model")
        axes.set_ylabel(f"task loss: nats per token (pre-trained: {points.of_base(COST):.2f})")
        axes.set_xlim(left=0)
        axes.legend(frameon=False, labelcolor="linecolor", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasSVG(figure)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def _rivals(axes: Any, methods: Sequence[str], found: dict[str, list[tuple[float, float]]]) -> None:
    """What has no term: a colour for all of it, and the front that it reaches together."""
    places = [place for method in methods for place in found[method]]
    best = front(np.array([(loss, drift) for drift, loss in places]))
    names = [words(method) for method in methods]
    label = "without terms: " + ";\n".join("; ".join(names[at : at + 2]) for at in range(0, len(names), 2))
    axes.plot(*zip(*places, strict=True), "o", color=INK, fillstyle="none", label=f"{label};\nfewer steps, scaled down")
    axes.plot(best[:, 1], best[:, 0], "--", color=INK, label="the best of them")


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
