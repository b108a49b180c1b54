"""The teacher's outputs on disk, by document: computed once, read in every later epoch and run.

A document is known by its content (tokens, counted positions, where its positions start), never by its place in a data
set: shuffling, packing, batch sizes and workers cannot give it another document's rows. What is used for training is
always what the cache holds, also in the micro-batch that computed it: a cold, a warm and a resumed run are the same.

What is kept of a counted token is in `rows`, the files are in `files`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..distributed import any_process
from ..fused.head import Head
from .documents import BOUNDARIES, Cutter, Document
from .files import FORMAT_VERSION, INDEXES, CacheFiles
from .in_memory import MemoryFiles
from .rows import RowChoice, Rows, Teacher, placed

FLUSH_BYTES = 256 << 20
FLUSH_DOCUMENTS = 1 << 16
_NEAR_BOUNDARY = 16  # rows of a document that are compared with the same document on its own
Run = Callable[[dict[str, Any]], Tensor]


class TeacherCache:
    """The outputs of one teacher in one directory. One per process; several may share the directory.

    Args:
        directory: Made if it is absent. Must be empty, or hold a cache of this teacher. Or memory in its place.
        choice: What decides what is kept of a token. Where that is its size alone, and the directory is empty, it is
            put off until the first token is stored, and `choose` is asked.
        base: Fingerprint of the teacher, see [`model_fingerprint`][balora_plugin.pretrained.fingerprint].
        tokenizer: Fingerprint of the tokenizer, if there is one: a guard; the states depend on token ids alone.
        precision: What the teacher computes in; another one is another cache.
        attention: Its attention implementation, for the record.
        rope_limit: Longest row for which a teacher with length-dependent rotary frequencies has its usual ones.

    Raises:
        ValueError: the directory holds something else; names both sides and the remedy.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | MemoryFiles,
        choice: RowChoice,
        *,
        base: str,
        tokenizer: str | None = None,
        precision: str = "float32",
        attention: str = "",
        rope_limit: int | None = None,
    ) -> None:
        self.choice = choice
        self.rows: Rows | None = None  # what is kept of a token; None: not decided yet
        self.why = ""  # it is that
        self.choose: Callable[[], tuple[Rows, str]] | None = None  # decides by the size of the data; else: unknown
        self.frozen = ""  # why a missing document may not be computed any more, if so
        self.where = ""  # for that error: the step
        self.on_miss: Callable[[], None] | None = None  # called when the teacher has to run
        self.runs = 0  # teacher forwards so far
        self._files = directory if isinstance(directory, MemoryFiles) else CacheFiles(directory)
        self.directory = self._files.directory
        self._attention = attention
        self._tolerance = 0.01 if precision in ("float32", "float64") else 0.1
        self._cutter = Cutter(self.directory, attention, rope_limit)
        self._pending: dict[bytes, np.ndarray] = {}
        self._pending_bytes = 0
        self._compared: set[str] = set()
        self._settled = False
        self._ours = {
            "format_version": FORMAT_VERSION,
            "base": base,
            "tokenizer": tokenizer,
            "precision": precision,
            "attention": attention,
        }
        asked = choice.asked()
        if self._files.read_header() is not None:
            self._adopt("as the directory began" if asked is None else f"teacher_cache_top_k={choice.top_k}")
        elif asked is not None:
            self._begin(asked, f"teacher_cache_top_k={choice.top_k}")

    def __len__(self) -> int:
        """Returns how many documents it holds."""
        return len(self._files) + len(self._pending)

    # --- what the objective calls

    @torch.compiler.disable(recursive=False)  # the teacher's forward may be compiled
    def states(
        self, inputs: dict[str, Any], counted: Tensor, run: Run, head: Callable[[], Head] | None = None
    ) -> Teacher:
        """Returns what the cache keeps of a micro-batch, as it stands there or, after one forward pass, through it.

        Args:
            inputs: The backbone's keywords: input_ids (B, L), perhaps attention_mask, position_ids.
            counted: (B, L) bool: positions whose states the loss needs.
            run: The teacher's forward: these keywords -> final hidden states (B, L, d).
            head: Its LM head, for log-probabilities.

        Returns:
            (B, L, d) bfloat16, or a TopLogProbs (B, L, K), (B, L, K), (B, L); on input_ids' device, zero where not
            counted.

        Raises:
            ValueError: inputs the states may depend on that are not part of the document; a teacher that sees across
                documents.
            RuntimeError: a document is missing that may not be computed any more.
        """
        documents = self._cutter.cut(inputs, counted)
        device = inputs["input_ids"].device
        kept = self.settle(device)
        rows = self._read(documents)
        if any_process(rows is None, device):  # forwards may be collective: all processes run, or none
            self._refuse_if_frozen(documents)
            if self.on_miss is not None:
                self.on_miss()
            self.runs += 1
            hidden = run(inputs)
            self._compare_alone(inputs, documents, hidden, run)
            # reading a sharded head is collective too
            self._add(documents, hidden, head() if kept.needs_head and head is not None else None)
            rows = self._read(documents)
        assert rows is not None
        return placed(kept.decode(rows), counted, device)

    def held(self, inputs: dict[str, Any], counted: Tensor) -> Teacher | None:
        """Returns what it holds of a micro-batch's M counted tokens, (M, ...) on the CPU; None if some are missing.

        No other process is asked.
        """
        rows = self._read(self._cutter.cut(inputs, counted))
        return None if rows is None or self.rows is None else self.rows.decode(rows)

    def tokens(self, inputs: dict[str, Any], counted: Tensor) -> int:
        """Returns how many tokens of this micro-batch are kept."""
        return sum(len(d.kept) for d in self._cutter.cut(inputs, counted))

    def missing(self, inputs: dict[str, Any], counted: Tensor) -> bool:
        """Returns whether a document of this micro-batch is not there yet."""
        return any(d.key not in self._files and d.key not in self._pending for d in self._cutter.cut(inputs, counted))

    @torch.compiler.disable
    def settle(self, device: torch.device) -> Rows:
        """Decides what is kept of a token, if that is open still, by all processes together; returns it."""
        if not self._settled:
            self._settled = True
            if any_process(self.rows is None, device):
                rows, why = self.choice.by_size(None) if self.choose is None else self.choose()
                if self.rows is None:
                    self._begin(rows, why)
        assert self.rows is not None
        return self.rows

    # --- computing

    @torch.compiler.disable
    def _refuse_if_frozen(self, documents: list[Document]) -> None:
        if not self.frozen:
            return
        lacking = [d for d in documents if d.key not in self._files and d.key not in self._pending]
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
        """Compares, once for packed and once for padded batches, a document on its own with what it has in the batch.

        Raises:
            ValueError: it does not.
        """
        ids = inputs["input_ids"]
        packed = [d for d in documents if d.packed and not d.first]
        shape = "packed" if packed else "padded"
        several = bool(packed) or ids.shape[0] > 1 or any(d.stop < ids.shape[1] for d in documents)
        due = bool(documents) and several and shape not in self._compared
        if not any_process(due, ids.device):
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
    def _add(self, documents: list[Document], hidden: Tensor, head: Head | None) -> None:
        assert self.rows is not None
        new = {d.key: d for d in documents if d.key not in self._files and d.key not in self._pending}
        if not new:
            return
        rows = np.concatenate([np.full(len(d.kept), d.row) for d in new.values()])
        columns = np.concatenate([d.kept for d in new.values()])
        picked = hidden.detach()[torch.from_numpy(rows).to(hidden.device), torch.from_numpy(columns).to(hidden.device)]
        encoded = self.rows.encode(picked, head)
        at = 0
        for key, document in new.items():
            self._pending[key] = encoded[at : at + len(document.kept)].copy()
            at += len(document.kept)
            self._pending_bytes += self._pending[key].nbytes
        if self._pending_bytes >= FLUSH_BYTES or len(self._pending) >= FLUSH_DOCUMENTS:
            self.flush()

    # --- reading and writing

    @torch.compiler.disable
    def _read(self, documents: list[Document]) -> np.ndarray | None:
        """Returns the counted rows of these documents, one after the other; None if one is missing or damaged.

        All of them are looked at before that is said: what is computed then is everything that has to be.
        """
        if self.rows is None or any(d.key not in self._files and d.key not in self._pending for d in documents):
            return None
        sizes = [int(d.wanted.sum()) for d in documents]
        out = np.empty((sum(sizes), *self.rows.shape), dtype=self.rows.dtype)
        at, whole = 0, True
        for document, n in zip(documents, sizes, strict=True):
            rows = self._pending.get(document.key)
            if rows is None:
                rows = self._files.read(document.key)
            if rows is None:
                whole = False
                continue
            out[at : at + n] = rows if n == len(rows) else rows[document.wanted]
            at += n
        return out if whole else None

    def refresh(self) -> None:
        """Reads the directory again: what other processes have finished is found, what is broken is ignored."""
        self._files.refresh()

    def flush(self) -> None:
        """Writes what is in memory to a new pair of files."""
        if not self._pending:
            return
        self._files.write(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def size(self) -> int:
        """Returns how many bytes the cache takes on disk."""
        return self._files.size()

    def _begin(self, rows: Rows, why: str) -> None:
        self._files.write_header({**self._ours, **rows.header()})
        self._adopt(why)

    def _adopt(self, why: str) -> None:
        """Takes what the header says, also if another process was faster with it."""
        header = self._files.read_header()
        assert header is not None
        for key, what in (
            ("format_version", "format version"),
            ("base", "base model (fingerprint)"),
            ("tokenizer", "tokenizer (fingerprint)"),
            ("precision", "precision of the teacher"),
        ):
            there, here = header.get(key), self._ours[key]
            if there == here or (key == "tokenizer" and None in (there, here)):
                continue
            if key == "format_version" and there in tuple(INDEXES):  # an earlier one is read as it is
                continue
            if key in ("base", "tokenizer"):
                there, here = str(there)[:8], str(here)[:8]
            raise ValueError(
                f"teacher_cache={self.directory} was made with another {what}: {there}, here {here}. Name another "
                "directory, or delete this one."
            )
        self.rows, self.why = self.choice.stored(header, self.directory), why
        self._files.dtype, self._files.shape = self.rows.dtype, self.rows.shape
        self._files.version = header["format_version"]
        self.refresh()
