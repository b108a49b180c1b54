"""Cuts a micro-batch into documents that are known by their content: what the teacher's states depend on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PIXELS = ("pixel", "image_", "video_", "input_features", "aspect_ratio", "cross_attention_mask")
_KINDS = ("token_type_ids", "mm_token_type_ids")  # 0: text, which is as if they were not there
_KNOWN_INPUTS = {"input_ids", "attention_mask", "position_ids", "use_cache"}
# where documents begin, said once more for kernels that take it so
BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


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
class Cutter:
    """How batches are cut for one cache.

    Args:
        name: The cache's directory, for errors.
        attention: The teacher's attention implementation.
        rope_limit: Longest row for which rotary frequencies do not depend on the row's length, or None.
    """

    name: Path
    attention: str = ""
    rope_limit: int | None = None

    @torch.compiler.disable
    def cut(self, inputs: dict[str, Any], counted: Tensor) -> list[Document]:
        """Returns the documents of a micro-batch with something counted, in the order of its rows.

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
        """Refuses a batch in which what says once more where documents begin differs from position_ids."""
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
                    f"teacher_cache={self.name}: {key} in the batch does not cut row {row} where position_ids "
                    "restart at 0, so documents cannot be told apart: remove teacher_cache."
                )

    def _checked_inputs(self, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        packed = inputs.get("position_ids") is not None and inputs.get("attention_mask") is None
        known = _KNOWN_INPUTS | BOUNDARIES if packed else _KNOWN_INPUTS
        given = {key for key, value in inputs.items() if value is not None}
        known = known | {key for key in _KINDS if key in given and not inputs[key].any()}
        pixels = sorted(key for key in given if key.startswith(_PIXELS))
        if pixels:
            raise ValueError(
                f"teacher_cache={self.name}: {pixels[0]} in the batch: the cache knows a document by its tokens, and "
                "those of two images are the same: remove teacher_cache."
            )
        unknown = sorted(given - known)
        if unknown or inputs.get("input_ids") is None:
            what = f"{unknown[0]} in the batch" if unknown else "a batch without input_ids"
            raise ValueError(
                f"teacher_cache={self.name}: {what} does not work with it, which knows a document by its "
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
                    f"teacher_cache={self.name}: {key} of shape {tuple(value.shape)} is not (B, L) = "
                    f"{tuple(ids.shape)}: remove teacher_cache."
                )
            arrays.append(None if value is None else value.cpu().numpy().astype(np.int64))
        mask, positions = arrays
        length = ids.shape[1] if positions is None else int(positions.max(initial=0)) + 1
        if self.rope_limit is not None and length > self.rope_limit:
            raise ValueError(
                f"teacher_cache={self.name}: a row of {length} positions is beyond {self.rope_limit}, where this "
                "model's rotary frequencies depend on the longest row of the batch: shorten the rows (max_length), or "
                "remove teacher_cache."
            )
        return ids.cpu().numpy().astype("<i8"), mask, positions

    def _pieces(
        self, row: int, length: int, mask: np.ndarray | None, positions: np.ndarray | None
    ) -> list[tuple[int, int]]:
        """Returns [start, stop) of each document of a row."""
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
        if mask is not None and cuts[begin + 1 : end].any() and "flash" not in self.attention:
            raise ValueError(
                f"attention_mask beside packed documents (position_ids or mask restart in row {row}): with "
                f"attn_implementation={self.attention or 'sdpa'!r} they would see each other, so the teacher's states "
                "are not the document's own: pack without attention_mask, or remove teacher_cache."
            )
        edges = [begin, *(np.flatnonzero(cuts[begin + 1 : end]) + begin + 1).tolist(), end]
        pieces = list(pairwise(edges))
        return pieces if mask is None else [(a, b) for a, b in pieces if mask[a:b].any()]


def _key(ids: np.ndarray, kept: np.ndarray, mask: np.ndarray | None, start: int, explicit: bool) -> bytes:
    """Returns 128 bits of everything the document's stored states depend on."""
    # positions that a model counts itself, behind padding on the left: models differ in how
    counted_by_model = start > 0 and not explicit
    digest = hashlib.blake2b(np.array([len(ids), start, counted_by_model], dtype="<i8").tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(ids).data)
    digest.update(kept.tobytes())
    if mask is not None and not mask.all():
        digest.update(mask.tobytes())
    return digest.digest()
