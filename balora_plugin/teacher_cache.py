"""The teacher's final hidden states on disk, by document: computed once, read in every later epoch and run.

A document is known by its content (tokens, counted positions, where its positions start), never by its place in a data
set: shuffling, packing, batch sizes and workers cannot give it another document's states. What is used for training is
always what the cache holds, also in the micro-batch that computed it: a cold, a warm and a resumed run are the same.

A directory holds `cache.json` (whose states these are) and pairs of files that are written once, under a temporary
name, and never changed: `<id>.npy`, bfloat16 bits as uint16 (rows, d), then `<id>.index.npy`, which says that the first
is whole. A process killed at any time leaves files that the next run ignores, and later removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

FORMAT_VERSION = 1
KIND = "hidden"
HEADER = "cache.json"
FLUSH_BYTES = 256 << 20
FLUSH_DOCUMENTS = 1 << 16
STALE_SECONDS = 3600.0

_INDEX = np.dtype([("key", "u1", (16,)), ("start", "<i8"), ("rows", "<i8"), ("crc", "<u4")])
_OURS = re.compile(r"[0-9a-f]{32}(\.index)?\.npy(\.tmp)?|cache\.json\.[0-9a-f]{32}\.tmp")
_KNOWN_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache"}
# where documents begin, said once more for kernels that take it so
_BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_NEAR_BOUNDARY = 16  # rows of a document that are compared with the same document on its own

Run = Callable[[dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Document:
    """Tokens [start, stop) of a row. `kept`: positions whose states are stored; `wanted`: which of them count here.

    The last position is always kept: whether it counts depends on what follows in a packed row. `packed`: the row holds
    documents by position_ids; `first`: nothing comes before it.
    """

    row: int
    start: int
    stop: int
    key: bytes
    kept: np.ndarray
    wanted: np.ndarray
    packed: bool
    first: bool


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
        self._rope_limit = rope_limit
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
        documents = self.documents(inputs, counted)
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
        return self._read(self.documents(inputs, counted))

    def add(self, inputs: dict[str, Any], counted: Tensor, hidden: Tensor) -> None:
        """Stores the documents of a micro-batch that are not there yet, from its states (B, L, d)."""
        self._add(self.documents(inputs, counted), hidden)

    def missing(self, inputs: dict[str, Any], counted: Tensor) -> bool:
        """True if a document of this micro-batch is not there yet."""
        return any(d.key not in self._places and d.key not in self._pending for d in self.documents(inputs, counted))

    # --- documents

    @torch.compiler.disable
    def documents(self, inputs: dict[str, Any], counted: Tensor) -> list[Document]:
        """The documents of a micro-batch with something counted, in the order of its rows.

        Raises:
            ValueError: what cannot be cut into documents with certainty; names the key.
        """
        ids, mask, positions = self._checked_inputs(inputs)
        flags = counted.cpu().numpy().astype(bool)
        found = []
        for row in range(ids.shape[0]):
            pieces = self._pieces(
                row, ids.shape[1], None if mask is None else mask[row], None if positions is None else positions[row]
            )
            self._check_boundaries(inputs, pieces, row)
            inside = np.zeros(ids.shape[1], dtype=bool)
            for start, stop in pieces:
                inside[start:stop] = True if mask is None else mask[row, start:stop] != 0
                picked = flags[row, start:stop]
                if not picked.any():
                    continue
                known = picked.copy()
                known[-1] = True
                found.append(
                    Document(
                        row=row,
                        start=start,
                        stop=stop,
                        key=_key(
                            ids[row, start:stop],
                            known,
                            None if mask is None else mask[row, start:stop] != 0,
                            start if positions is None else int(positions[row, start]),
                            positions is not None,
                        ),
                        kept=np.flatnonzero(known) + start,
                        wanted=picked[known],
                        packed=len(pieces) > 1,
                        first=start == pieces[0][0],
                    )
                )
            if (flags[row] & ~inside).any():
                raise ValueError(
                    f"labels count position {int(np.flatnonzero(flags[row] & ~inside)[0])} of row {row}, which "
                    "attention_mask leaves out, so its teacher states belong to no document: set such labels to -100 "
                    "(a tokenizer that pads on the left: padding_side='right'), or remove teacher_cache."
                )
        return found

    def _check_boundaries(self, inputs: dict[str, Any], pieces: list[tuple[int, int]], row: int) -> None:
        """What says once more where documents begin must say the same as position_ids."""
        edges = [0, *(stop for _, stop in pieces)]
        for key in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
            value = inputs.get(key)
            if value is None:
                continue
            if key == "seq_idx":
                changes = np.flatnonzero(np.diff(value[min(row, len(value) - 1)].cpu().numpy())) + 1
                same = [0, *changes.tolist(), value.shape[-1]] == edges
            else:
                same = len(inputs["input_ids"]) == 1 and value.tolist() == edges
            if not same:
                raise ValueError(
                    f"teacher_cache={self.directory}: {key} in the batch does not cut row {row} where position_ids "
                    "restart at 0, so documents cannot be told apart: remove teacher_cache."
                )

    def _checked_inputs(self, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        packed = inputs.get("position_ids") is not None and inputs.get("attention_mask") is None
        known = _KNOWN_INPUTS | _BOUNDARIES if packed else _KNOWN_INPUTS
        unknown = sorted(key for key, value in inputs.items() if key not in known and value is not None)
        if unknown or inputs.get("input_ids") is None:
            what = f"{unknown[0]} in the batch" if unknown else "a batch without input_ids"
            raise ValueError(
                f"teacher_cache={self.directory}: {what} does not work with it, which knows a document by its "
                "input_ids: leave that out of the batch, or remove teacher_cache."
            )
        ids = inputs["input_ids"]
        arrays = []
        for key in ("attention_mask", "position_ids"):
            value = inputs.get(key)
            if value is not None and value.shape == (1, ids.shape[1]):
                value = value.expand_as(ids)
            if value is not None and value.shape != ids.shape:
                raise ValueError(
                    f"teacher_cache={self.directory}: {key} of shape {tuple(value.shape)} is not (B, L) = "
                    f"{tuple(ids.shape)}: remove teacher_cache."
                )
            arrays.append(None if value is None else value.cpu().numpy().astype(np.int64))
        mask, positions = arrays
        length = ids.shape[1] if positions is None else int(positions.max(initial=0)) + 1
        if self._rope_limit is not None and length > self._rope_limit:
            raise ValueError(
                f"teacher_cache={self.directory}: a row of {length} positions is beyond {self._rope_limit}, where this "
                "model's rotary frequencies depend on the longest row of the batch: shorten the rows (max_length), or "
                "remove teacher_cache."
            )
        return ids.cpu().numpy().astype("<i8"), mask, positions

    def _pieces(
        self, row: int, length: int, mask: np.ndarray | None, positions: np.ndarray | None
    ) -> list[tuple[int, int]]:
        """[start, stop) of each document of a row."""
        attended = np.arange(length) if mask is None else np.flatnonzero(mask)
        if not len(attended):
            return []
        begin, end = int(attended[0]), int(attended[-1]) + 1
        cuts = np.zeros(length, dtype=bool)
        if mask is not None and mask.max() > 1:  # numbered documents: one ends where the number changes
            cuts[1:] = mask[1:] != mask[:-1]
        if positions is not None:
            restart = np.flatnonzero(positions[begin + 1 : end] != positions[begin : end - 1] + 1) + begin + 1
            wrong = restart[positions[restart] != 0]
            if len(wrong):
                at = int(wrong[0])
                raise ValueError(
                    f"position_ids of row {row} go from {positions[at - 1]} to {positions[at]} at {at}: where they "
                    "neither continue nor restart at 0, documents cannot be told apart; remove teacher_cache."
                )
            cuts[restart] = True
        if mask is not None and cuts[begin + 1 : end].any() and "flash" not in self._attention:
            raise ValueError(
                f"attention_mask beside packed documents (position_ids or mask restart in row {row}): with "
                f"attn_implementation={self._attention or 'sdpa'!r} they would see each other, so the teacher's states "
                "are not the document's own: pack without attention_mask, or remove teacher_cache."
            )
        edges = [begin, *(np.flatnonzero(cuts[begin + 1 : end]) + begin + 1).tolist(), end]
        pieces = list(pairwise(edges))
        return pieces if mask is None else [(a, b) for a, b in pieces if mask[a:b].any()]

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
            if key not in _BOUNDARIES
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


def counted_positions(inputs: dict[str, Any]) -> Tensor:
    """(B, L) bool: positions that predict a counted label, from `labels` or already shifted `shift_labels`."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"] != -100
    counted = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    counted[:, :-1] = inputs["labels"][:, 1:] != -100  # position t predicts label t + 1
    return counted


@torch.compiler.disable
def anywhere(flag: bool, device: torch.device) -> bool:
    """True on every process if `flag` is on one of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return flag
    total = torch.tensor(int(flag), device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return bool(total.item())


def _key(ids: np.ndarray, kept: np.ndarray, mask: np.ndarray | None, start: int, explicit: bool) -> bytes:
    """128 bits of everything the document's stored states depend on."""
    # positions that a model counts itself, behind padding on the left: models differ in how
    counted_by_model = start > 0 and not explicit
    digest = hashlib.blake2b(np.array([len(ids), start, counted_by_model], dtype="<i8").tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(ids).data)
    digest.update(kept.tobytes())
    if mask is not None and not mask.all():
        digest.update(mask.tobytes())
    return digest.digest()


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
