"""Pieces of the reports: Markdown tables and what a mean over seeds looks like."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.measuring import table

__all__ = ["mean_and_spread", "page", "table"]


def mean_and_spread(values: Sequence[float], decimals: int = 3, factor: float = 1.0) -> str:
    """ "1.062 ± 0.004": mean and standard deviation over seeds, which a single value has not."""
    scaled = [factor * value for value in values]
    text = f"{statistics.fmean(scaled):.{decimals}f}"
    return text if len(scaled) < 2 else f"{text} ± {statistics.stdev(scaled):.{decimals}f}"


def page(*parts: str) -> str:
    """Paragraphs, headings and tables as a Markdown page; empty parts fall out."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
