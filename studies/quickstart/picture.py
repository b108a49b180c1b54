"""The quickstart's one picture: task loss against drift, a point per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from balora_plugin.report.drawing import Look, Picture, png

from .report import Row


def drift_against_loss(rows: Sequence[Row]) -> Picture:
    """The rows as points, the first one (before) included; hollow ones are the drift on other text."""

    def draw(figure: Any, look: Look) -> None:
        axes = figure.subplots()
        for place, row in enumerate(rows):
            colour = look.text if not place else look.colour(place - 1)
            loss = row.measured.task_loss
            axes.plot([loss, loss], [row.measured.drift, row.other_drift], color=colour, lw=0.8)
            axes.plot(loss, row.measured.drift, "o", ms=9, color=colour, label=row.label)
            axes.plot(loss, row.other_drift, "o", ms=7, mfc="none", color=colour)
        axes.set_xlabel("held-out task loss, nats per token")
        axes.set_ylabel("drift, nats per token")
        axes.legend(title="filled: on the task\nhollow: on other text", title_fontsize=9)

    return Picture("drift_against_loss", "Drift against task loss", "Low and left is better.", draw)


def write_picture(path: Path, rows: Sequence[Row]) -> None:
    """Draws the rows into a PNG file."""
    path.write_bytes(png(drift_against_loss(rows), "light", transparent=False))
