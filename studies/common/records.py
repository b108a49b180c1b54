"""Cells of a study as JSON files, one a cell: what exists is not run again, so an interrupted study goes on."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balora_plugin.atomic import write_text

Record = dict[str, Any]
DIGITS = 6  # significant ones that are kept of a measured number


@dataclass(frozen=True)
class Cell:
    """One thing to run: `name` is its file's, `setting` what tells it from others; both stand in its record."""

    name: str
    setting: Mapping[str, Any]


class Runs:
    """The records of one study in a folder. `shared` is what all of them have in common: model, data and sizes.

    Raises:
        SystemExit: the folder holds a record made with something else in `shared`.
    """

    def __init__(self, folder: Path, shared: Mapping[str, Any]) -> None:
        self.folder, self.shared = folder, dict(shared)
        folder.mkdir(parents=True, exist_ok=True)
        for record in read(folder):
            other = {key for key in self.shared if record["shared"].get(key) != self.shared[key]}
            if other:
                key = sorted(other)[0]
                raise SystemExit(
                    f"{folder}/{record['cell']}.json was run with {key} = {record['shared'].get(key)!r}, now "
                    f"{self.shared[key]!r}: give another --output, or the same sizes"
                )

    def path(self, cell: Cell) -> Path:
        """Where the cell's record is, or will be."""
        return self.folder / f"{cell.name}.json"

    def once(self, cell: Cell, run: Callable[[], Mapping[str, Any]]) -> bool:
        """Runs a cell that has no record and keeps what it found; False where there is one already."""
        path = self.path(cell)
        if path.is_file():
            return False
        began = time.perf_counter()
        found = run()
        record = {
            "cell": cell.name,
            "setting": dict(cell.setting),
            "shared": self.shared,
            "machine": machine_in_words(),
            "seconds": round(time.perf_counter() - began, 1),
            **found,
        }
        write_text(path, json.dumps(rounded(record), separators=(",", ":")) + "\n")
        return True


def read(folder: Path) -> list[Record]:
    """All records of a folder, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def rounded(value: Any) -> Any:
    """`value` with every float in it at DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def machine_in_words() -> str:
    """Processor, threads and versions."""
    import torch

    from benchmarks.measuring import machine

    return machine(torch.device("cpu"))


def command_of(module: str, arguments: Sequence[str] | None) -> str:
    """The command line as it was given, for a report. Paths stand as they were written."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])
