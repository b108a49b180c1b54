"""How large saved weights are, read from their files: of checkpoints of earlier releases, which have no manifest."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16 is the upper half of a float32
_HEADER = 100 << 20  # bytes, safetensors' own limit
_PATTERNS = ("adapter_model*.safetensors", "model*.safetensors")


def largest_saved(directory: str, adapters: Sequence[str]) -> float | None:
    """Returns the largest magnitude in a checkpoint's safetensors files; None where it has none.

    NaN where a value is, or where a file is damaged. `adapters`: names, as PEFT saves them.
    """
    folders = {Path(directory), *(Path(directory, name) for name in adapters if name != "default")}
    files = [file for folder in folders for pattern in _PATTERNS for file in folder.glob(pattern)]
    found = [_largest_in(file) for file in files]
    return None if not found else math.nan if any(map(math.isnan, found)) else max(found)


def _largest_in(file: Path) -> float:
    """The largest magnitude of the floating-point tensors of one file, one tensor in memory at a time."""
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: Any = json.loads(opened.read(length)) if length <= _HEADER else None
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        largest = [_largest_of(file, 8 + length, entry) for entry in tensors if entry["dtype"] in _TYPES]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return math.nan
    return float(np.max(largest, initial=0.0))  # NaN if one is


def _largest_of(file: Path, start: int, entry: dict[str, Any]) -> float:
    begin, end = entry["data_offsets"]
    kind: np.dtype[Any] = np.dtype(_TYPES[entry["dtype"]])
    if begin == end:
        return 0.0
    values: Any = np.memmap(file, kind, "r", offset=start + begin, shape=((end - begin) // kind.itemsize,))
    if entry["dtype"] == "BF16":
        values = (values.astype("<u4") << 16).view("<f4")
    return float(np.max(np.abs(values)))
