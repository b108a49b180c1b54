"""The files of a teacher cache: a header, and pairs of numpy arrays that are written once. Nothing is unpickled.

A pair is `<id>.npy`, the rows, and then `<id>.index.npy`, which says where in it each document's are and that the first
is whole; both have a temporary name while they are written. A process killed at any time leaves files that the next run
ignores, and later removes.

Of a damaged pair every document is served that is whole: other processes may be reading it. One that is not is computed
again, into another pair, and its entry then loses its key, at its place in a new copy of the index. A pair is removed
where nothing in it can be read.

Of all indexes together only the keys stay in memory (`index`); what an entry says of its rows is read with them.

What is in a file is believed when its checksums say so: each document's rows have one in the index, and since format
version 2 each entry of the index and the header have one of their own. Directories of version 1 are read, and
completed, as they are.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..atomic import create_text, reason, replacing
from ..checkpoint.json_file import read_object
from .checksums import crc_of_rows
from .index import Entry, Index

FORMAT_VERSION = 2
HEADER = "cache.json"
STALE_SECONDS = 3600.0
RETRIES = (0.1, 1.0, 5.0)  # seconds before a file that cannot be read is tried again

CHECK = "check"  # the header's key of its checksum
_ENTRY = [("key", "u1", (16,)), ("start", "<i8"), ("rows", "<i8"), ("crc", "<u4")]
INDEXES = {1: np.dtype(_ENTRY), 2: np.dtype([*_ENTRY, (CHECK, "<u4")])}  # by format version: an entry of the index
_HEAD_BYTES = 1 << 12  # holds the header of any array of ours
_PREFIX = 10  # bytes of it before its text: a magic string, a version, the text's length
_OURS = re.compile(r"[0-9a-f]{32}(\.index)?\.npy(\.([0-9a-f]{32}\.)?tmp)?|cache\.json\.[0-9a-f]{32}\.tmp")


@dataclass(frozen=True)
class _Layout:
    """What an array's header says: where its numbers begin (bytes), and what they are."""

    begin: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]


class CacheFiles:
    """A cache's directory.

    `dtype` and `shape` are those of one row, `version` the directory's; set before the first array is read or written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.version = FORMAT_VERSION
        self.dtype = np.dtype("<u2")
        self.shape: tuple[int, ...] = ()
        self._index = Index()
        self._damaged: dict[str, dict[int, bytes]] = {}  # by shard: entries that were found so, and their keys

    def __len__(self) -> int:
        """Returns how many documents it holds, as far as it was read."""
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[bytes]:
        """All keys."""
        return iter(self._index)

    def memory(self) -> int:
        """Returns how many bytes its index takes in memory."""
        return self._index.memory()

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
            entries = os.listdir(directory)
            header = read_object(path) if os.path.lexists(path) else None  # a link to nothing too
        except OSError as error:
            raise ValueError(
                f"teacher_cache={directory} cannot be used ({reason(error)}): name a directory that can be written."
            ) from None
        except ValueError:
            header = {}
        if header is None:
            foreign = sorted(name for name in entries if not _OURS.fullmatch(name) and name != HEADER)
            if foreign:
                raise ValueError(
                    f"teacher_cache={directory} holds {foreign[0]} and no {HEADER}: name a directory of its own."
                )
            return None
        check = header.pop(CHECK, None)
        unchecked = check is None and header.get("format_version") == 1
        if not header or not (unchecked or check == _check(header)):
            raise ValueError(
                f"teacher_cache={directory}: its {HEADER} is not readable, or was changed: delete the directory, or "
                "name another."
            )
        return header

    def write_header(self, values: Mapping[str, Any]) -> None:
        """Writes the header if no other process has meanwhile."""
        try:
            create_text(self.directory / HEADER, json.dumps({**values, CHECK: _check(values)}, indent=2))
        except OSError as error:
            raise ValueError(
                f"teacher_cache={self.directory} cannot be written ({reason(error)}): name a directory that can."
            ) from None

    # --- arrays

    def refresh(self) -> None:
        """Reads the directory: finds all documents that look whole, removes old files of which nothing can be read."""
        shards: list[tuple[str, np.ndarray]] = []
        now = time.time()
        for path in sorted(self.directory.iterdir()):  # of two copies of a document every process takes the same
            if path.name.endswith(".index.npy") and _OURS.fullmatch(path.name):
                try:
                    keys = self._keys(path)
                except OSError:  # what cannot be read just now is not broken
                    continue
                if keys is None or not keys.any():  # nothing in it that another process could be reading
                    for part in (path, self.directory / path.name.replace(".index", "")):
                        _remove_if_stale(part, now)
                else:
                    shards.append((path.name.removesuffix(".index.npy"), keys))
            elif path.name.endswith(".tmp") or (
                path.name != HEADER and not (self.directory / f"{path.stem}.index.npy").exists()
            ):
                _remove_if_stale(path, now)
        self._index = Index(shards)

    def size(self) -> int:
        """Returns how many bytes the cache takes on disk."""
        total = 0
        for path in self.directory.iterdir():
            with suppress(OSError):
                total += path.stat().st_size if _OURS.fullmatch(path.name) else 0
        return total

    def write(self, documents: dict[bytes, np.ndarray]) -> None:
        """Writes a new pair of files with these rows by key.

        Raises:
            OSError: names the directory.
        """
        name = uuid.uuid4().hex
        index = np.zeros(len(documents), dtype=INDEXES[self.version])
        names = _names(index.dtype)
        start = 0
        for i, (key, rows) in enumerate(documents.items()):
            crc = zlib.crc32(_bytes(np.ascontiguousarray(rows)))
            index[i] = (np.frombuffer(key, dtype=np.uint8), start, len(rows), crc, 0)[: len(names)]
            start += len(rows)
        if CHECK in names:
            index[CHECK] = _checks(index)
        rows = np.concatenate(list(documents.values())).astype(self.dtype, copy=False)
        try:
            _write(self.directory / f"{name}.npy", rows)
            _write(self.directory / f"{name}.index.npy", index)
            keys = self._keys(self.directory / f"{name}.index.npy")
        except OSError as error:
            raise self._error("cannot be written", error) from error
        if keys is None or len(keys) < len(documents) or not keys.any(axis=1).all():
            raise OSError(f"teacher_cache={self.directory}: {name}.npy was not written whole; is the disk full?")
        self._index.add(name, list(documents))
        self._take_out_damaged()

    def read(self, key: bytes) -> np.ndarray | None:
        """Reads a document's rows, (n, *shape), and compares them with their checksum when they are read first.

        Returns:
            None if it is not here, or damaged, and no other process has written it again.

        Raises:
            OSError: the file cannot be read just now (too many open files, a network file system); names the directory.
        """
        rows = self._read_known(key)
        if rows is None:
            self._find_new()
            rows = self._read_known(key)
        return rows

    def _read_known(self, key: bytes) -> np.ndarray | None:
        """Reads a document from the first pair that has it whole."""
        rows = None
        while rows is None and (found := self._index.find(key)) is not None:
            rows = self._retried(key, found)
        return rows

    def _retried(self, key: bytes, found: Entry) -> np.ndarray | None:
        """Reads a document; where it is gone or damaged, forgets it, or with their files all of its pair."""
        for wait in (*RETRIES, None):
            try:
                rows = self._rows(key, found)
            except FileNotFoundError:
                self._index.drop(found.shard)
                return None
            except OSError as error:  # what cannot be read now is not broken
                if wait is None:
                    raise self._error(f"{found.shard}.npy cannot be read", error) from error
                time.sleep(wait)
                continue
            if rows is None:
                self._index.forget(key, found.number)
                self._damaged.setdefault(found.shard, {})[found.row] = key
            return rows
        return None

    def _find_new(self) -> None:
        """Takes in the pairs that other processes have written since the directory was read."""
        with suppress(OSError):
            for path in sorted(self.directory.glob("*.index.npy")):
                shard = path.name.removesuffix(".index.npy")
                if shard in self._index.shards or not _OURS.fullmatch(path.name):
                    continue
                keys = self._keys(path)
                if keys is not None:
                    self._index.add(shard, [key.tobytes() for key in keys])

    def _take_out_damaged(self) -> None:
        """Takes the keys of damaged documents out of their indexes, so that the next run finds their new rows.

        All other entries stay where they are, for processes that know them by their place.
        """
        damaged, self._damaged = self._damaged, {}
        for shard, entries in damaged.items():
            path = self.directory / f"{shard}.index.npy"
            with suppress(OSError):  # then the next run finds them damaged, as this one did
                found = self._entries(path.read_bytes())
                if found is None:
                    continue
                index = found.copy()
                for row, key in entries.items():
                    if row < len(index) and index[row]["key"].tobytes() == key:
                        index[row]["key"] = 0
                        if CHECK in _names(index.dtype):
                            index[CHECK][row] = _checks(index[row : row + 1])[0]
                _write(path, index)

    def _rows(self, key: bytes, found: Entry) -> np.ndarray | None:
        entry = self._entry(key, found)
        if entry is None:
            return None
        with open(self.directory / f"{found.shard}.npy", "rb") as file:  # not a memory map: a cut file is no crash
            layout = _layout(file)
            if layout is None:
                return None
            rows = np.empty((int(entry["rows"]), *self.shape), dtype=self.dtype)
            file.seek(layout.begin + int(entry["start"]) * self._width())
            whole = file.readinto(_bytes(rows)) == rows.nbytes
        # an entry of the first version has no checksum of its own: another one may stand there by now
        verified = self.version > 1 and self._index.is_verified(found.number)
        if not whole or not (verified or zlib.crc32(_bytes(rows)) == entry["crc"]):
            return None
        self._index.verify(found.number)
        return rows

    def _entry(self, key: bytes, found: Entry) -> Any:
        """Reads an entry of an index; None if it is not what it was when the directory was read."""
        kind = INDEXES[self.version]
        with open(self.directory / f"{found.shard}.index.npy", "rb") as file:
            layout = _layout(file)
            if layout is None or layout.dtype != kind:
                return None
            file.seek(layout.begin + found.row * kind.itemsize)
            data = file.read(kind.itemsize)
        if len(data) != kind.itemsize:
            return None
        (entry,) = np.frombuffer(data, kind)
        checked = CHECK not in _names(kind) or entry[CHECK] == zlib.crc32(data[: INDEXES[1].itemsize])
        return entry if checked and entry["key"].tobytes() == key and entry["rows"] > 0 else None

    def _width(self) -> int:
        """Returns how many bytes a row takes."""
        return self.dtype.itemsize * int(np.prod(self.shape))

    def _error(self, what: str, error: OSError) -> OSError:
        """Returns the error that names this directory."""
        text = f"teacher_cache={self.directory}: {what}: {reason(error)}"
        return OSError(text) if error.errno is None else OSError(error.errno, text)

    def _keys(self, path: Path) -> np.ndarray | None:
        """Returns the keys (n, 16) of one pair of files, 0 for what is damaged; None if nothing in it can be read.

        Raises:
            OSError: one of them cannot be read just now.
        """
        try:
            data = path.read_bytes()
            with open(self.directory / path.name.replace(".index", ""), "rb") as file:
                rows = _layout(file)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return None
        index = self._entries(data)
        if index is None or rows is None or rows.fortran or rows.dtype != self.dtype or rows.shape[1:] != self.shape:
            return None
        there = (size - rows.begin) // self._width()
        first, count = index["start"], index["rows"]
        whole = (first >= 0) & (count > 0) & (count <= there) & (first <= there - count)
        if CHECK in _names(index.dtype):
            whole &= index[CHECK] == _checks(index)
        return np.where(whole[:, None], index["key"], np.uint8(0))

    def _entries(self, data: bytes) -> np.ndarray | None:
        """Returns the entries that an index file holds, damaged ones too, or None if they cannot be told apart."""
        layout, kind = _layout(io.BytesIO(data)), INDEXES[self.version]
        if layout is None or layout.dtype != kind or len(layout.shape) != 1:
            return None
        there = (len(data) - layout.begin) // kind.itemsize
        return np.frombuffer(data, kind, min(layout.shape[0], there), offset=layout.begin)


def _names(kind: np.dtype[Any]) -> tuple[str, ...]:
    return kind.names or ()


def _layout(file: IO[bytes]) -> _Layout | None:
    """Reads an array's header; None if it is damaged."""
    head = file.read(_HEAD_BYTES)
    return _layout_of(head[: _PREFIX + int.from_bytes(head[_PREFIX - 2 : _PREFIX], "little")])


@lru_cache(maxsize=1024)  # by the text: most pairs of a cache begin alike, and numpy parses it as a program
def _layout_of(head: bytes) -> _Layout | None:
    file = io.BytesIO(head)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return None
        with warnings.catch_warnings():  # of a damaged one numpy may think that Python 2 wrote it
            warnings.simplefilter("ignore")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception:  # numpy evaluates the text of a literal: nearly any error may come of one wrong bit
        return None
    return _Layout(file.tell(), shape, fortran, dtype)


def _check(header: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(dict(header), sort_keys=True).encode())


def _checks(index: np.ndarray) -> np.ndarray:
    """Returns the CRC-32 of each entry of an index, over everything in it but itself."""
    return crc_of_rows(np.frombuffer(_bytes(index), np.uint8).reshape(len(index), -1)[:, : INDEXES[1].itemsize])


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
