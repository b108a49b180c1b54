"""A teacher cache without files, for what one process alone needs and can compute again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import FORMAT_VERSION


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
        self._rows: dict[bytes, np.ndarray] = {}

    def __len__(self) -> int:
        """Returns how many documents it holds."""
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def read_header(self) -> dict[str, Any] | None:
        return None if self._header is None else dict(self._header)

    def write_header(self, values: Mapping[str, Any]) -> None:
        self._header = dict(values)

    def refresh(self) -> None:
        """No other process adds to it."""

    def size(self) -> int:
        """Returns how many bytes its rows take."""
        return sum(rows.nbytes for rows in self._rows.values())

    def write(self, documents: dict[bytes, np.ndarray]) -> None:
        """Keeps these rows by key."""
        self._rows |= documents

    def read(self, key: bytes) -> np.ndarray | None:
        """Returns a document's rows, (n, *shape); None if it is not here."""
        return self._rows.get(key)
