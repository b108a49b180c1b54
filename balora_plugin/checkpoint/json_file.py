"""JSON files that somebody else may have written or damaged: read as one mapping, or refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

LARGEST = 16 << 20  # bytes; the files of this package have some kilobytes, or some hundred for thousands of layers
DEEPEST = 24  # mappings and lists inside one another; ours have four


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the mapping that a JSON file holds.

    Raises:
        ValueError: it holds something else, or nothing that can be read; names the file.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST >> 20} MiB: it is no such file.")
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError(f"{path} is nested too deep: it is no such file.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({Path(path).name} was cut short or edited): {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__} and no mapping of keys to values.")
    if _deeper_than(values, DEEPEST):
        raise ValueError(f"{path} is nested too deep: it is no such file.")
    return values


def read_record(path: str | os.PathLike[str], keys: Collection[str]) -> dict[str, Any]:
    """Returns the record of a finished run that a command has kept, NaN and Infinity included.

    Raises:
        ValueError: it is no JSON mapping, or one of `keys` is missing; names the file, and what to do.
        OSError: it cannot be opened.
    """
    again = "remove the file, and its run is made again"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): {again}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__} and no record: {again}.")
    missing = sorted(set(keys) - values.keys())
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}: another release wrote it, or it was edited: {again}.")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):  # which of the two is meant?
        names = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in names if names.count(key) > 1)!r} stands in it twice")
    return values


def _deeper_than(values: Any, limit: int) -> bool:
    """Returns whether more than `limit` mappings and lists stand inside one another, without recursion."""
    level = [values]
    for _ in range(limit):
        inner = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list)))
        level = [each for parts in inner for each in parts]
    return any(isinstance(part, (dict, list)) for part in level)
