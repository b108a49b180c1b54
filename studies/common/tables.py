"""Pieces of the reports: Markdown tables and what a mean over seeds looks like."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.measuring import table

from .records import Record

__all__ = ["commands", "mean_and_spread", "page", "shares", "table"]

TERMS = ("consistency", "diversity", "svd")


def mean_and_spread(values: Sequence[float], decimals: int = 3, factor: float = 1.0) -> str:
    """ "1.062 ± 0.004": mean and standard deviation over seeds, which a single value has not."""
    scaled = [factor * value for value in values]
    text = f"{statistics.fmean(scaled):.{decimals}f}"
    return text if len(scaled) < 2 else f"{text} ± {statistics.stdev(scaled):.{decimals}f}"


def page(*parts: str) -> str:
    """Paragraphs, headings and tables as a Markdown page; empty parts fall out."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def shares(records: Sequence[Record], methods: Iterable[str]) -> str:
    """The largest logged share of the gradient of each term, by method; empty where none was logged."""
    rows = []
    for name in methods:
        logged = [entry for record in records if record["setting"]["method"] == name for entry in record["history"]]
        found = [[entry[k] for entry in logged if (k := f"balora/share_{term}") in entry] for term in TERMS]
        if any(found):
            rows.append([name, *(f"{max(values):.2g}" if values else "-" for values in found)])
    return table(["largest share of the task's gradient", *TERMS], rows) if rows else ""


def commands(records: Sequence[Record], command: str) -> str:
    """How each cell is repeated."""
    return "```\n" + "\n".join(f"{command} --cells {record['cell']}" for record in records) + "\n```"
