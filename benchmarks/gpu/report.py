"""What a run on a device has found, as data and as a page: written anew after every section."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from balora_plugin.atomic import replacing

from ..measuring import processor, table, versions

Cell = str | float | int
LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "trl",
    "axolotl",
    "accelerate",
    "liger_kernel",
    "cut_cross_entropy",
    "flash_attn",
    "flash_attn_3",
    "bitsandbytes",
    "balora_plugin",
)


@dataclass(frozen=True)
class Table:
    """One table. Numbers stay numbers until they are printed; NaN is an empty cell."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    after: str = ""

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", table(self.header, [[printed(cell) for cell in row] for row in self.rows])]
        return "\n".join([*lines, "", self.after] if self.after else lines)


@dataclass
class Section:
    """What one section gave: its tables, seconds, and, where it did not come to its end, why."""

    name: str
    title: str
    seconds: float = 0.0
    failure: str = ""
    tables: list[Table] = field(default_factory=list)

    def markdown(self) -> str:
        parts = [f"## {self.title}", *(found.markdown() for found in self.tables)]
        if self.failure:
            parts.append(f"Not whole: {self.failure}.")
        return "\n\n".join(parts)


def printed(cell: Cell) -> str:
    """Four significant digits, and no exponent where there need be none."""
    if isinstance(cell, str | int):
        return str(cell)
    if not math.isfinite(cell):
        return ""
    return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"


def facts(device: torch.device) -> dict[str, str]:
    """The device, the machine and the versions."""
    found = {"date": time.strftime("%Y-%m-%d"), "device": processor(), "processor": processor()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found["CUDA"] = str(torch.version.cuda)
        found["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["cores"] = str(os.cpu_count())
    found["load"] = f"{os.getloadavg()[0]:.1f} at the start"
    found["Python"] = platform.python_version()
    found["commit"] = _said("git", "rev-parse", "--short", "HEAD")
    return {**{key: value for key, value in found.items() if value}, **dict(versions(*LIBRARIES))}


def _said(*command: str) -> str:
    """The first line that a command prints; "" without it."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (run.stdout.splitlines() or [""])[0].strip()


def write(folder: Path, known: dict[str, str], sections: list[Section]) -> None:
    """Writes gpu.md and gpu.json; either is whole at any time."""
    summary = Table(
        "Sections",
        ("section", "seconds", "what came of it"),
        [(s.name, s.seconds, s.failure or f"{len(s.tables)} table(s)") for s in sections],
    )
    lines = [f"# Measured on {known['device']}", "`make gpu`: " + ", ".join(f"{k} {v}" for k, v in known.items())]
    page = "\n\n".join([*lines, summary.markdown(), *(section.markdown() for section in sections)]) + "\n"
    data = {"facts": known, "sections": [_without_nan(asdict(section)) for section in sections]}
    for name, text in (("gpu.md", page), ("gpu.json", json.dumps(data, indent=1, allow_nan=False) + "\n")):
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """JSON has none."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
