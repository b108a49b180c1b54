"""The teacher's final hidden states on disk, by document: computed once, read in every later epoch and run.

A document is known by its content (tokens, counted positions, where its positions start), never by its place in a data
set: shuffling, packing, batch sizes and workers cannot give it another document's states. What is used for training is
always what the cache holds, also in the micro-batch that computed it: a cold, a warm and a resumed run are the same.

A directory holds `cache.json` (whose states these are) and pairs of files that are written once, under a temporary
name, and never changed: `<id>.npy`, bfloat16 bits as uint16 (rows, d), then `<id>.index.npy`, which says that the first
is whole. A process killed at any time leaves files that the next run ignores, and later removes.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .documents import BOUNDARIES, Cutter, Document

FORMAT_VERSION = 1
KIND = "hidden"
HEADER = "cache.json"
FLUSH_BYTES = 256 << 20
FLUSH_DOCUMENTS = 1 << 16
STALE_SECONDS = 3600.0

_INDEX = np.dtype([("key", "u1", (16,)), ("start", "<i8"), ("rows", "<i8"), ("crc", "<u4")])
_OURS = re.compile(r"[0-9a-f]{32}(\.index)?\.npy(\.tmp)?|cache\.json\.[0-9a-f]{32}\.tmp")
_NEAR_BOUNDARY = 16  # rows of a document that are compared with the same document on its own

Run = Callable[[dict[str, Any]], Tensor]


@dataclass(frozen=True)
class _Place:
    shard: str
    offset: int  # in the file, in bytes
    rows: int
    crc: int


class TeacherCache:
    """Final hidden states of one teacher in one directory. One per process; several may share the directory.

    Args:
        directory: Made if it is absent. Must be empty, or hold a cache of this teacher.
        base: Fingerprint of the teacher, see [`fingerprint.model_fingerprint`][balora_plugin.fingerprint].
        tokenizer: Fingerprint of the tokenizer, if there is one: a guard; the states depend on token ids alone.
        hidden_size: d.
        precision: What the teacher computes in; another one is another cache.
        attention: Its attention implementation, for the record.
        rope_limit: Longest row for which a teacher with length-dependent rotary frequencies has its usual ones.

    Raises:
        ValueError: the directory holds something else; names both sides and the remedy.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        base: str,
        hidden_size: int,
        tokenizer: str | None = None,
        precision: str = "float32",
        attention: str = "",
        rope_limit: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.hidden_size = hidden_size
        self.frozen = ""  # why a missing document may not be computed any more, if so
        self.where = ""  # for that error: the step
        self.on_miss: Callable[[], None] | None = None  # called when the teacher has to run
        self.runs = 0  # teacher forwards so far
        self._attention = attention
        self._tolerance = 0.01 if precision in ("float32", "float64") else 0.1
        self._cutter = Cutter(self.directory, attention, rope_limit)
        self._places: dict[bytes, _Place] = {}
        self._verified: set[bytes] = set()
        self._pending: dict[bytes, np.ndarray] = {}
        self._pending_bytes = 0
        self._compared: set[str] = set()
        self._open_header(
            {
                "format_version": FORMAT_VERSION,
                "kind": KIND,
                "hidden_size": hidden_size,
                "dtype": "bfloat16",
                "base": base,
                "tokenizer": tokenizer,
                "precision": precision,
                "attention": attention,
            }
        )
        self.refresh()

    def __len__(self) -> int:
        """How many documents it holds."""
        return len(self._places) + len(self._pending)

    # --- what the objective calls

    @torch.compiler.disable(recursive=False)  # the teacher's forward may be compiled
    def states(self, inputs: dict[str, Any], counted: Tensor, run: Run) -> Tensor:
        """The teacher's states of a micro-batch, from the cache or, after one forward pass, through it.

        Args:
            inputs: The backbone's keywords: input_ids (B, L), perhaps attention_mask, position_ids.
            counted: (B, L) bool: positions whose states the loss needs.
            run: The teacher's forward: these keywords -> final hidden states (B, L, d).

        Returns:
            (B, L, d) bfloat16 on input_ids' device, zero where not counted.

        Raises:
            ValueError: inputs the states may depend on that are not part of the document; a teacher that sees across
                documents.
            RuntimeError: a document is missing that may not be computed any more.
        """
        documents = self._cutter.cut(inputs, counted)
        rows = self._read(documents)
        device = inputs["input_ids"].device
        if anywhere(rows is None, device):  # forwards may be collective: all processes run, or none
            self._refuse_if_frozen(documents)
            if self.on_miss is not None:
                self.on_miss()
            self.runs += 1
            hidden = run(inputs)
            self._compare_alone(inputs, documents, hidden, run)
            self._add(documents, hidden)
            rows = self._read(documents)
        assert rows is not None
        states = torch.zeros((*counted.shape, self.hidden_size), dtype=torch.bfloat16, device=device)
        states[counted.to(device)] = rows.to(device)
        return states

    def lookup(self, inputs: dict[str, Any], counted: Tensor) -> Tensor | None:
        """(M, d) bfloat16 on the CPU, in the order of `states[counted]`; None if a document is missing."""
        return self._read(self._cutter.cut(inputs, counted))

    def add(self, inputs: dict[str, Any], counted: Tensor, hidden: Tensor) -> None:
        """Stores the documents of a micro-batch that are not there yet, from its states (B, L, d)."""
        self._add(self._cutter.cut(inputs, counted), hidden)

    def missing(self, inputs: dict[str, Any], counted: Tensor) -> bool:
        """True if a document of this micro-batch is not there yet."""
        return any(d.key not in self._places and d.key not in self._pending for d in self._cutter.cut(inputs, counted))

    # --- computing

    @torch.compiler.disable
    def _refuse_if_frozen(self, documents: list[Document]) -> None:
        if not self.frozen:
            return
        lacking = [d for d in documents if d.key not in self._places and d.key not in self._pending]
        what = (
            f"the document at tokens {lacking[0].start}:{lacking[0].stop} of row {lacking[0].row}"
            if lacking
            else "a document of another process"
        )
        raise RuntimeError(
            f"teacher_cache={self.directory} lacks {what} of the batch{self.where and f' at {self.where}'}, and "
            f"{self.frozen}: pass teacher_model=<the pre-trained model>, or complete the cache with a run from the "
            "pre-trained weights over the same data (one directory for all processes)."
        )

    @torch.compiler.disable
    def _compare_alone(self, inputs: dict[str, Any], documents: list[Document], hidden: Tensor, run: Run) -> None:
        """Once for packed and once for padded batches: a document on its own must have the states it has in the batch.

        Raises:
            ValueError: it does not.
        """
        ids = inputs["input_ids"]
        packed = [d for d in documents if d.packed and not d.first]
        shape = "packed" if packed else "padded"
        several = bool(packed) or ids.shape[0] > 1 or any(d.stop < ids.shape[1] for d in documents)
        due = bool(documents) and several and shape not in self._compared
        if not anywhere(due, ids.device):
            return
        if packed or documents:
            document = packed[0] if packed else min(documents, key=lambda d: d.stop)
            start, row, stop = (document.start if packed else 0), document.row, document.stop
        else:  # another process compares; forwards may be collective
            start, row, stop = 0, 0, ids.shape[1]
        alone = {
            key: value[min(row, len(value) - 1) :][:1, start:stop] if isinstance(value, Tensor) else value
            for key, value in inputs.items()
            if key not in BOUNDARIES
        }
        self.runs += 1
        single = run(alone)
        if not due:
            return
        self._compared.add(shape)
        first = document.start
        last = min(stop, first + _NEAR_BOUNDARY)
        a, b = hidden[row, first:last].float(), single[0, first - start : last - start].float().to(hidden.device)
        error = ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-6)).median().item()
        if not error < self._tolerance:
            raise ValueError(
                f"teacher_cache={self.directory}: the teacher's states of a {shape} document differ from those of the "
                f"same document on its own (relative difference {error:.1e}; attn_implementation="
                f"{self._attention!r}): it sees its neighbours. Change how batches are {shape} "
                f"({'attention that keeps packed documents apart, or packing off' if packed else 'no padding'}), or "
                "remove teacher_cache."
            )

    @torch.compiler.disable
    def _add(self, documents: list[Document], hidden: Tensor) -> None:
        new = {d.key: d for d in documents if d.key not in self._places and d.key not in self._pending}
        if not new:
            return
        rows = np.concatenate([np.full(len(d.kept), d.row) for d in new.values()])
        columns = np.concatenate([d.kept for d in new.values()])
        picked = hidden.detach()[torch.from_numpy(rows).to(hidden.device), torch.from_numpy(columns).to(hidden.device)]
        bits = picked.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
        at = 0
        for key, document in new.items():
            self._pending[key] = bits[at : at + len(document.kept)].copy()
            at += len(document.kept)
            self._pending_bytes += self._pending[key].nbytes
        if self._pending_bytes >= FLUSH_BYTES or len(self._pending) >= FLUSH_DOCUMENTS:
            self.flush()

    # --- reading

    @torch.compiler.disable
    def _read(self, documents: list[Document]) -> Tensor | None:
        """(M, d) bfloat16: the counted states of these documents, one after the other; None if one is missing."""
        if any(d.key not in self._places and d.key not in self._pending for d in documents):
            return None
        out = np.empty((sum(int(d.wanted.sum()) for d in documents), self.hidden_size), dtype=np.uint16)
        at = 0
        for document in documents:
            bits = self._pending.get(document.key)
            if bits is None:
                bits = self._read_place(document.key)
            if bits is None:
                return None
            n = int(document.wanted.sum())
            out[at : at + n] = bits[document.wanted]
            at += n
        return torch.from_numpy(out).view(torch.bfloat16)

    def _read_place(self, key: bytes) -> np.ndarray | None:
        """One document's bits; None if the file does not hold what its index says: the pair is then given up."""
        place = self._places[key]
        bits = np.empty((place.rows, self.hidden_size), dtype="<u2")
        try:
            with open(self.directory / f"{place.shard}.npy", "rb") as file:  # not a memory map: a cut file is no crash
                file.seek(place.offset)
                whole = file.readinto(bits.data.cast("B")) == bits.nbytes
        except OSError:
            whole = False
        if whole and key not in self._verified:
            whole = zlib.crc32(bits.data) == place.crc
            self._verified.add(key)
        if not whole:
            self._places = {k: p for k, p in self._places.items() if p.shard != place.shard}
            with suppress(OSError):
                (self.directory / f"{place.shard}.index.npy").unlink()
            return None
        return bits

    # --- files

    def refresh(self) -> None:
        """Reads the directory again: what other processes have finished is found, what is broken is ignored."""
        self._places = {}
        self._verified = set()
        now = time.time()
        for path in sorted(self.directory.iterdir()):  # of two copies of a document every process takes the same
            if path.name.endswith(".index.npy") and _OURS.fullmatch(path.name):
                places = self._read_index(path)
                if places is None:
                    for part in (path, self.directory / path.name.replace(".index", "")):
                        _remove_if_stale(part, now)
                for key, place in (places or {}).items():
                    self._places.setdefault(key, place)
            elif path.name.endswith(".tmp") or (
                path.name != HEADER and not (self.directory / f"{path.stem}.index.npy").exists()
            ):
                _remove_if_stale(path, now)

    def _read_index(self, path: Path) -> dict[bytes, _Place] | None:
        """The documents of one pair of files, or None if the pair is not whole."""
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
        width = 2 * self.hidden_size
        if index.dtype != _INDEX or index.ndim != 1 or fortran or dtype != np.dtype("<u2"):
            return None
        ends = np.cumsum(index["rows"])
        total = int(ends[-1]) if len(index) else 0
        if shape != (total, self.hidden_size) or size != begin + total * width:
            return None
        if (index["rows"] < 1).any() or (index["start"] != ends - index["rows"]).any():
            return None
        return {
            entry["key"].tobytes(): _Place(shard, begin + int(entry["start"]) * width, int(entry["rows"]), crc)
            for entry, crc in zip(index, index["crc"].tolist(), strict=True)
        }

    def flush(self) -> None:
        """Writes what is in memory to a new pair of files."""
        if not self._pending:
            return
        name = uuid.uuid4().hex
        bits = np.concatenate(list(self._pending.values())).astype("<u2", copy=False)
        index = np.empty(len(self._pending), dtype=_INDEX)
        start = 0
        for i, (key, value) in enumerate(self._pending.items()):
            crc = zlib.crc32(np.ascontiguousarray(value).data)
            index[i] = (np.frombuffer(key, dtype=np.uint8), start, len(value), crc)
            start += len(value)
        try:
            _write(self.directory / f"{name}.npy", bits)
            _write(self.directory / f"{name}.index.npy", index)
        except OSError as error:
            raise OSError(error.errno, f"teacher_cache={self.directory} cannot be written: {error.strerror}") from error
        places = self._read_index(self.directory / f"{name}.index.npy")
        if places is None:
            raise OSError(f"teacher_cache={self.directory}: {name}.npy was not written whole; is the disk full?")
        self._places.update(places)
        self._pending, self._pending_bytes = {}, 0

    def _open_header(self, ours: dict[str, Any]) -> None:
        path = self.directory / HEADER
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"teacher_cache={self.directory} is a file: name a directory.")
        self.directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            foreign = [entry.name for entry in self.directory.iterdir() if not _OURS.fullmatch(entry.name)]
            if foreign and not path.exists():  # another process may have been faster
                raise ValueError(
                    f"teacher_cache={self.directory} holds {sorted(foreign)[0]} and no {HEADER}: name a directory of "
                    "its own."
                )
            _write_header(path, ours)
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(theirs, dict):
                raise ValueError("no mapping")
        except ValueError:
            raise ValueError(
                f"teacher_cache={self.directory}: its {HEADER} is not readable: delete the directory, or name another."
            ) from None
        for key, what in (
            ("format_version", "format version"),
            ("kind", "kind"),
            ("dtype", "dtype"),
            ("base", "base model (fingerprint)"),
            ("hidden_size", "hidden size"),
            ("tokenizer", "tokenizer (fingerprint)"),
            ("precision", "precision of the teacher"),
        ):
            there, here = theirs.get(key), ours[key]
            if there == here or (key == "tokenizer" and None in (there, here)):
                continue
            if key in ("base", "tokenizer"):
                there, here = str(there)[:8], str(here)[:8]
            raise ValueError(
                f"teacher_cache={self.directory} was made with another {what}: {there}, here {here}. Name another "
                "directory, or delete this one."
            )


@torch.compiler.disable
def anywhere(flag: bool, device: torch.device) -> bool:
    """True on every process if `flag` is on one of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return flag
    total = torch.tensor(int(flag), device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return bool(total.item())


def _write(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _write_header(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(values, indent=2), encoding="utf-8")
    try:
        os.link(temporary, path)  # unlike a rename it never replaces what another process has written meanwhile
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(temporary, path)
    temporary.unlink(missing_ok=True)


def _remove_if_stale(path: Path, now: float) -> None:
    """Removes a file that a killed process left; a young one may still be being written."""
    with suppress(OSError):
        if _OURS.fullmatch(path.name) and now - path.stat().st_mtime > STALE_SECONDS:
            path.unlink()
