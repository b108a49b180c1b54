"""The report: every point, and for each point with a term how far it lies from the front of all cheap rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..common.bootstrap import REPEATS, Interval, Weights, intervals
from ..common.fronts import front, price_at
from ..common.records import Record
from ..common.tables import commands, mean_and_spread, page, shares, table
from .cells import METHODS
from .points import AXES, COST, Axis, Points

BASE = "pre-trained"


def gaps(points: Points, axis: Axis, repeats: int) -> dict[int, Interval]:
    """By point with a term its price minus the rivals' least price at the same task loss: negative is better.

    Rivals count with the seeds that the point has. NaN where no rival reaches the task loss at all.
    """
    rival = np.array([METHODS[point.method].is_rival for point in points.points])
    asked = [place for place in np.flatnonzero(~rival) if not np.isnan(points.means(axis)[place])]

    def statistic(weights: Weights) -> np.ndarray:
        found = []
        for place in asked:
            allowed = points.has[place]
            cost, price = (points.means(kind, weights, allowed) for kind in (COST, axis))
            known = rival & ~np.isnan(cost) & ~np.isnan(price)
            if np.isnan(cost[place]) or not known.any():
                found.append(np.nan)
                continue
            rivals = np.column_stack([cost, price])[known]
            found.append(price[place] - price_at(rivals, cost[place]))
        return np.array(found)

    if not asked or not rival.any():
        return {}
    return dict(zip(asked, intervals(statistic, points.counts(), repeats), strict=True))


def all_points(points: Points) -> str:
    """A row a point: mean ± deviation over its seeds; rivals that no rival beats are marked for the task's drift."""
    axes = (COST, *AXES)
    by_seed = {axis: points.by_seed(axis) for axis in axes}
    base = [f"{points.of_base(axis):.{axis.decimals}f}" for axis in axes]
    rows = [[BASE, "", *base]]
    for place, point in enumerate(points.points):
        cells = []
        for axis in axes:
            seen = by_seed[axis][place][points.has[place]]
            cells.append("-" if np.isnan(seen).any() else mean_and_spread(list(seen), axis.decimals))
        rows.append([point.text(), str(points.has[place].sum()), *cells])
    return table(["", "seeds", *(axis.name for axis in axes)], rows)


def rivals_front(points: Points, axis: Axis) -> str:
    """Names of the rivals' points that are on their front, by rising task loss."""
    cost, price = points.means(COST), points.means(axis)
    places = [
        p
        for p, point in enumerate(points.points)
        if METHODS[point.method].is_rival and not np.isnan(cost[p] + price[p])
    ]
    if not places:
        return ""
    kept = {tuple(row) for row in front(np.column_stack([cost, price])[places])}
    names = [points.points[p].text() for p in sorted(places, key=lambda p: cost[p]) if (cost[p], price[p]) in kept]
    return f"Front of {axis.name}: " + "; ".join(names) + "."


def gap_table(points: Points, repeats: int) -> str:
    """A row a point with a term, a column an axis."""
    found = {axis: gaps(points, axis, repeats) for axis in AXES}
    places = sorted({place for by_place in found.values() for place in by_place})
    rows = []
    for place in places:
        cells = [found[axis][place].text(axis.decimals) if place in found[axis] else "-" for axis in AXES]
        rows.append([points.points[place].text(), str(points.has[place].sum()), *cells])
    return table(["", "seeds", *(axis.name for axis in AXES)], rows) if rows else ""


def verdict(points: Points, repeats: int) -> str:
    """How many points with a term lie below, on and above the rivals' front, by axis: counted, not judged."""
    rows = []
    for axis in AXES:
        found = [gap for gap in gaps(points, axis, repeats).values() if not np.isnan(gap.value)]
        below = sum(gap.high < 0 for gap in found)
        above = sum(gap.low > 0 for gap in found)
        rows.append([axis.name, str(below), str(len(found) - below - above), str(above)])
    return table(["", "below the rivals' front", "within chance", "above it"], rows)


def report(records: Sequence[Record], base: Record, about: Mapping[str, str], repeats: int = REPEATS) -> str:
    """The whole page. `about`: `command`, `what` (sizes in words)."""
    points = Points(records, base)
    machines = sorted({record["machine"] for record in records})
    minutes = sum(record["seconds"] for record in records) / 60
    missing = [name for name in METHODS if not any(record["setting"]["method"] == name for record in records)]
    return page(
        "# Forgetting at equal task loss",
        f"Written by `{about['command']}`. {about['what']}",
        f"{len(records)} runs, {minutes:.0f} minutes of one thread on a machine with other work; "
        f"{'; '.join(machines)}.",
        f"Not run yet: {', '.join(missing)}." if missing else "",
        "## Does a term give a point that no rival reaches?",
        "A rival is a run without terms, or with its adapter scaled down afterwards: a smaller rate, fewer "
        "steps, decay "
        "towards the start, a factor on the adapter. Their front is the least of a quantity that they reach at a task "
        "loss or below, on straight lines between their points. Below: how many points with a term lie under that "
        "front, the interval of the difference leaving out 0.",
        verdict(points, repeats),
        "Each point minus the front at its own task loss (negative: better than every rival), with a 95 % "
        "interval from "
        "a paired bootstrap over documents and seeds (of one seed over documents alone). * where it leaves "
        "out 0: of so "
        "many, one in twenty by chance. -: not measured there, or no rival reaches that task loss.",
        gap_table(points, repeats),
        "## All points",
        "Mean ± standard deviation over seeds; nats per counted token. Drift is KL(pre-trained ‖ trained). CrowS: per "
        "cent of the pairs whose more stereotyping sentence is the more likely one (50: no preference).",
        all_points(points),
        *(rivals_front(points, axis) for axis in AXES[:3]),
        "## How strong the terms were",
        shares(records, METHODS),
        "## Repeating a cell",
        "A cell whose file exists is not run again: remove it, or write to another `--output`.",
        commands(records, about["command"]),
    )


def write(path: Path, text: str) -> None:
    """Writes the report."""
    path.write_text(text, encoding="utf-8")
