"""Prints the quickstart's table and its reading, and writes the same numbers as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .measure import Measurement

COLUMNS = ("model", "task loss", "drift, task", "drift, other", "s/step", "seconds")
LINE = 100  # characters, for prose


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `measured` is of the held-out pairs, `other_drift` of text of another kind. `seconds` of fine-tuning and those of
    one step are None for the pre-trained model; `largest_share`, the strongest regulariser's gradient relative to the
    task's, is None without regularisers.
    """

    key: str
    label: str
    measured: Measurement
    seconds: float | None = None
    largest_share: float | None = None
    other_drift: float = 0.0
    seconds_per_step: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The line as text, in the order of `COLUMNS`."""
        found = self.measured
        return (
            self.label,
            f"{found.task_loss:.3f}",
            f"{found.drift:.3f}",
            f"{self.other_drift:.3f}",
            "-" if self.seconds_per_step is None else f"{self.seconds_per_step:.2f}",
            "-" if self.seconds is None else f"{self.seconds:.1f}",
        )


def format_table(rows: Sequence[Row]) -> str:
    """An aligned text table, names to the left and numbers to the right."""
    lines = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (tuple(zip(line, widths, strict=True)) for line in lines)
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def reading(rows: Sequence[Row]) -> str:
    """What the table does and does not show, with the differences to PiSSA as measured; empty without PiSSA."""
    found = {row.key: row for row in rows}
    pissa = found.get("pissa-delta") or found.get("pissa")
    if pissa is None:
        return ""
    sentences = []
    if recommended := found.get("ba-lora"):
        sentences.append(
            f"BA-LoRA at the recommended setting {_difference(recommended, pissa)}. It starts where PiSSA does and "
            "adds the consistency term: raise lambda_consistency to stay closer, lower it to learn more."
        )
    if paper := found.get("ba-lora-paper"):
        sentences.append(
            f"At the paper's weights BA-LoRA {_difference(paper, pissa)}: expect no more than PiSSA there, "
            "since these weights are tiny."
        )
    if visible := found.get("ba-lora-visible"):
        sentences.append(
            "What the terms do shows with larger weights, 0.5 / 0.02 / 0.02: the visible setting "
            f"{_difference(visible, pissa)}."
        )
    return "\n".join(textwrap.fill(sentence, LINE) for sentence in sentences)


def _difference(one: Row, other: Row) -> str:
    """How `one` differs from `other` in task loss and drift, and how strong its terms were, in words."""
    task = _signed(one.measured.task_loss - other.measured.task_loss)
    drift = _signed(one.measured.drift - other.measured.drift)
    share = "" if one.largest_share is None else f" (strongest term: {one.largest_share:.1g} of the task's gradient)"
    return f"differs from {other.label} by {task} in task loss and {drift} in drift{share}"


def _signed(value: float) -> str:
    """Three decimals with a sign, and no negative zero."""
    return f"{round(value, 3) + 0.0:+.3f}"


def loading_snippet(base: Path, adapter: Path) -> str:
    """Four lines that load a saved adapter with plain PEFT."""
    return "\n".join(
        (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            f'base = AutoModelForCausalLM.from_pretrained("{base.as_posix()}")',
            f'model = PeftModel.from_pretrained(base, "{adapter.as_posix()}")',
        )
    )


def write_results(path: Path, rows: Sequence[Row], details: Mapping[str, Any]) -> None:
    """Writes `details` and all rows to `path` as JSON."""
    table = [asdict(row) | row.measured.as_dict() for row in rows]
    for entry in table:
        del entry["measured"]  # its fields stand beside the others
    path.write_text(json.dumps(dict(details) | {"rows": table}, indent=2) + "\n")
