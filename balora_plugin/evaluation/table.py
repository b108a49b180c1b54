"""Figures as a table for people and as data for files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .figures import Figure, Measured, difference, measured

_DIFFERENCE = "difference"


def as_rows(figures: Sequence[Figure], sides: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row a figure: task, metric, documents, a [`Measured`] by side and, of two sides, their difference."""
    rows = []
    for figure in figures:
        row: dict[str, Any] = {"task": figure.task, "metric": figure.name, "documents": figure.documents}
        row["higher_is_better"] = figure.better
        row |= {side: measured(figure, side) for side in sides if side in figure.values}
        if len(sides) == 2 and set(sides) <= set(figure.values):
            row[_DIFFERENCE] = difference(figure, *sides)
        rows.append(row)
    return rows


def as_json(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows as what JSON holds."""
    return [{k: v.as_json() if isinstance(v, Measured) else v for k, v in row.items()} for row in rows]


def as_table(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> str:
    """Returns a Markdown table; "±" is one standard error."""
    columns = [*sides, *([_DIFFERENCE] if len(sides) == 2 else [])]
    lines = [["task", "metric", "better", "documents", *columns]]
    for row in rows:
        better = {True: "higher", False: "lower", None: ""}[row["higher_is_better"]]
        cells = [_cell(row.get(column), signed=column == _DIFFERENCE) for column in columns]
        lines.append([row["task"], row["metric"], better, str(row["documents"]), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = "-|-".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (text[0],)) + f"\n|-{rule}-|\n" + "\n".join(f"| {t} |" for t in text[1:])


def _cell(value: Measured | None, *, signed: bool) -> str:
    if value is None:
        return ""
    if not np.isfinite(value.value):
        return "nothing counted"
    sign = "+" if signed else ""
    if value.error is None:
        return f"{value.value:{sign}.4f}"
    return f"{value.value:{sign}.4f} ± {value.error:.4f}"


def not_finite(figures: Sequence[Figure]) -> list[str]:
    """Returns the figures some document of which has a value that is no number."""
    found = []
    for figure in figures:
        numbers = [n for values in figure.values.values() for value in values for n in np.ravel(value)]
        if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):  # numpy's are floats too
            found.append(f"{figure.task}, {figure.name}")
    return found
