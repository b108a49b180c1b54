"""Fronts: the least of one quantity (drift, say) that a set of points reaches at each level of another (task loss)."""

from __future__ import annotations

import numpy as np


def front(points: np.ndarray) -> np.ndarray:
    """The points [n, 2] of (cost, price) that no other one beats in both, by rising cost: [m, 2], prices falling."""
    kept: list[np.ndarray] = []
    for point in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return np.array(kept)


def price_at(points: np.ndarray, cost: float) -> float:
    """The least price at this cost or below, on straight lines between the front's points.

    Between two points something lies: a length of training, a rate or a scale in the middle. NaN where the cost is
    below what any of the points reaches; that of the last point where it is above all.
    """
    best = front(points)
    if cost < best[0, 0]:
        return float("nan")
    return float(np.interp(cost, best[:, 0], best[:, 1]))
