"""The files of a teacher cache: a header, and pairs of numpy arrays that are written once. Nothing is unpickled.

A pair is `<id>.npy`, the rows, and then `<id>.index.npy`, which says where in it each document's are and that the first
is whole; both have a temporary name while they are written. A process killed at any time leaves files that the next run
ignores, and later removes.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import create_text, replacing

FORMAT_VERSION = 1
HEADER = "cache.json"
STALE_SECONDS = 3600.0
RETRIES = (0.1, 1.0, 5.0)  # seconds before a file that cannot be read is tried again

_INDEX = np.dtype([("key", "u1", (16,)), ("start", "<i8"), ("rows", "<i8"), ("crc", "<u4")])
_OURS = re.compile(r"[0-9a-f]{32}(\.index)?\.npy(\.([0-9a-f]{32}\.)?tmp)?|cache\.json\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True)
class Place:
    """Where one document's rows are: `offset` in bytes."""

    shard: str
    offset: int
    rows: int
    crc: int


class CacheFiles:
    """A cache's directory. `dtype` and `shape` are those of one row, set before the first array is read or written."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.dtype = np.dtype("<u2")
        self.shape: tuple[int, ...] = ()

    # --- header

    def read_header(self) -> dict[str, Any] | None:
        """Returns the header; None if the directory is empty (it is made if it is absent).

        Raises:
            ValueError: a file, a directory with something else in it, or a header that cannot be read.
        """
        directory, path = self.directory, self.directory / HEADER
        if directory.exists() and not directory.is_dir():
            raise ValueError(f"teacher_cache={directory} is a file: name a directory.")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            os.listdir(directory)
        except OSError as error:
            raise ValueError(
                f"teacher_cache={directory} cannot be used ({error.strerror}): name a directory that can be written."
            ) from None
        if not path.exists():
            foreign = [entry.name for entry in directory.iterdir() if not _OURS.fullmatch(entry.name)]
            if not path.exists():  # another process may have been faster
                if foreign:
                    raise ValueError(
                        f"teacher_cache={directory} holds {sorted(foreign)[0]} and no {HEADER}: name a directory of "
                        "its own."
                    )
                return None
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(header, dict):
                raise ValueError("no mapping")
        except ValueError:
            raise ValueError(
                f"teacher_cache={directory}: its {HEADER} is not readable: delete the directory, or name another."
            ) from None
        return header

    def write_header(self, values: dict[str, Any]) -> None:
        """Writes the header if no other process has meanwhile."""
        try:
            create_text(self.directory / HEADER, json.dumps(values, indent=2))
        except OSError as error:
            raise ValueError(
                f"teacher_cache={self.directory} cannot be written ({error.strerror}): name a directory that can."
            ) from None

    # --- arrays

    def scan(self) -> dict[bytes, Place]:
        """Returns all documents of whole pairs, and removes what is broken or half written once it is old."""
        found: dict[bytes, Place] = {}
        now = time.time()
        for path in sorted(self.directory.iterdir()):  # of two copies of a document every process takes the same
            if path.name.endswith(".index.npy") and _OURS.fullmatch(path.name):
                places = self._read_index(path)
                if places is None:
                    for part in (path, self.directory / path.name.replace(".index", "")):
                        _remove_if_stale(part, now)
                for key, place in (places or {}).items():
                    found.setdefault(key, place)
            elif path.name.endswith(".tmp") or (
                path.name != HEADER and not (self.directory / f"{path.stem}.index.npy").exists()
            ):
                _remove_if_stale(path, now)
        return found

    def size(self) -> int:
        """Returns how many bytes the cache takes on disk."""
        total = 0
        for path in self.directory.iterdir():
            with suppress(OSError):
                total += path.stat().st_size if _OURS.fullmatch(path.name) else 0
        return total

    def write(self, documents: dict[bytes, np.ndarray]) -> dict[bytes, Place]:
        """Writes a new pair of files with these rows by key; returns their places.

        Raises:
            OSError: names the directory.
        """
        name = uuid.uuid4().hex
        index = np.empty(len(documents), dtype=_INDEX)
        start = 0
        for i, (key, rows) in enumerate(documents.items()):
            crc = zlib.crc32(_bytes(np.ascontiguousarray(rows)))
            index[i] = (np.frombuffer(key, dtype=np.uint8), start, len(rows), crc)
            start += len(rows)
        rows = np.concatenate(list(documents.values())).astype(self.dtype, copy=False)
        try:
            _write(self.directory / f"{name}.npy", rows)
            _write(self.directory / f"{name}.index.npy", index)
        except OSError as error:
            raise OSError(error.errno, f"teacher_cache={self.directory} cannot be written: {error.strerror}") from error
        places = self._read_index(self.directory / f"{name}.index.npy")
        if places is None:
            raise OSError(f"teacher_cache={self.directory}: {name}.npy was not written whole; is the disk full?")
        return places

    def read(self, place: Place, *, verify: bool) -> np.ndarray | None:
        """Reads rows, (n, *shape); None if the file does not hold what its index says: the pair is then given up.

        Raises:
            OSError: the file cannot be read just now (too many open files, a network file system); names the directory.
        """
        rows = np.empty((place.rows, *self.shape), dtype=self.dtype)
        path = self.directory / f"{place.shard}.npy"
        for wait in (*RETRIES, None):
            try:
                with open(path, "rb") as file:  # not a memory map: a cut file is no crash
                    file.seek(place.offset)
                    whole = file.readinto(_bytes(rows)) == rows.nbytes
                break
            except FileNotFoundError:
                whole = False
                break
            except OSError as error:  # what cannot be read now is not broken
                if wait is None:
                    raise OSError(
                        error.errno, f"teacher_cache={self.directory}: {path.name} cannot be read: {error.strerror}"
                    ) from error
                time.sleep(wait)
        if whole and (not verify or zlib.crc32(_bytes(rows)) == place.crc):
            return rows
        with suppress(OSError):
            (self.directory / f"{place.shard}.index.npy").unlink()
        return None

    def _read_index(self, path: Path) -> dict[bytes, Place] | None:
        """Returns the documents of one pair of files, or None if the pair is not whole."""
        shard = path.name.removesuffix(".index.npy")
        payload = self.directory / f"{shard}.npy"
        try:
            index = np.load(path, allow_pickle=False)
            with open(payload, "rb") as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    return None
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                begin = file.tell()
            size = payload.stat().st_size
        except (OSError, ValueError, EOFError, SyntaxError):
            return None
        width = self.dtype.itemsize * int(np.prod(self.shape))
        if index.dtype != _INDEX or index.ndim != 1 or fortran or dtype != self.dtype:
            return None
        ends = np.cumsum(index["rows"])
        total = int(ends[-1]) if len(index) else 0
        if shape != (total, *self.shape) or size != begin + total * width:
            return None
        if (index["rows"] < 1).any() or (index["start"] != ends - index["rows"]).any():
            return None
        return {
            entry["key"].tobytes(): Place(shard, begin + int(entry["start"]) * width, int(entry["rows"]), crc)
            for entry, crc in zip(index, index["crc"].tolist(), strict=True)
        }


def _bytes(rows: np.ndarray) -> memoryview:
    """Returns a contiguous array's memory."""
    return rows.reshape(-1).view(np.uint8).data


def _write(path: Path, array: np.ndarray) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)


def _remove_if_stale(path: Path, now: float) -> None:
    """Removes a file that a killed process left; a young one may still be being written."""
    with suppress(OSError):
        if _OURS.fullmatch(path.name) and now - path.stat().st_mtime > STALE_SECONDS:
            path.unlink()
