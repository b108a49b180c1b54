"""A teacher cache without files, for what one process alone needs and can compute again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import FORMAT_VERSION, Place


class MemoryFiles:
    """Stands in the place of [`CacheFiles`][balora_plugin.teacher.files]: the same calls, arrays in a dict.

    Args:
        name: What errors call it.
    """

    def __init__(self, name: str) -> None:
        self.directory = Path(name)
        self.version = FORMAT_VERSION
        self.dtype = np.dtype("<u2")
        self.shape: tuple[int, ...] = ()
        self._header: dict[str, Any] | None = None
        self._places: dict[bytes, Place] = {}
        self._rows: list[np.ndarray] = []

    def read_header(self) -> dict[str, Any] | None:
        return None if self._header is None else dict(self._header)

    def write_header(self, values: Mapping[str, Any]) -> None:
        self._header = dict(values)

    def scan(self) -> dict[bytes, Place]:
        """Returns all documents."""
        return dict(self._places)

    def size(self) -> int:
        """Returns how many bytes its rows take."""
        return sum(rows.nbytes for rows in self._rows)

    def write(self, documents: dict[bytes, np.ndarray]) -> dict[bytes, Place]:
        """Keeps these rows by key; returns their places."""
        written = {}
        for key, rows in documents.items():
            written[key] = Place("", len(self._rows), len(rows), 0)
            self._rows.append(rows)
        self._places |= written
        return written

    def read(self, place: Place, *, verify: bool) -> np.ndarray | None:
        """Returns rows, (n, *shape)."""
        return self._rows[place.offset]
