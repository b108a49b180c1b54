"""What a teacher cache keeps of a counted token: its final hidden state, or its K largest log-probabilities; and which.

Both are numpy types of a fixed size a token. `encode` makes them from the teacher's final hidden states, `decode` gives
what the loss takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fused import TopLogProbs, top_log_probs
from ..fused.head import Head
from ..fused.top import TOP_FORMS

HIDDEN_LIMIT = 50e9  # bytes of hidden states beyond which they are not kept unasked
AUTOMATIC_TOP_K = 128


@dataclass(frozen=True)
class HiddenRows:
    """(d,) bfloat16, as its bits: exact for every form and temperature but for that rounding."""

    hidden_size: int
    kind = "hidden"
    dtype = np.dtype("<u2")
    needs_head = False

    def __str__(self) -> str:
        return "final hidden states in bfloat16"

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one token's row."""
        return (self.hidden_size,)

    @property
    def size(self) -> int:
        """Returns the bytes of a token."""
        return 2 * self.hidden_size

    def header(self) -> dict[str, Any]:
        """Returns its keys in the cache's header."""
        return {"kind": self.kind, "hidden_size": self.hidden_size, "dtype": "bfloat16"}

    def encode(self, hidden: Tensor, head: Head | None = None) -> np.ndarray:
        """Encodes final hidden states, (M, d) -> (M, d) uint16."""
        return hidden.to(torch.bfloat16).cpu().view(torch.uint16).numpy()

    def decode(self, rows: np.ndarray) -> Tensor:
        """Decodes rows to (M, d) bfloat16 on the CPU."""
        return torch.from_numpy(rows.astype(np.uint16, copy=False)).view(torch.bfloat16)


@dataclass(frozen=True)
class TopRows:
    """K token ids in int32, their log-probabilities at one temperature in float16, the log mass of the rest in float32.

    float16 and not bfloat16: the same size with 8 times less error, and log-probabilities never leave its range (below
    -65504 they are cut; their probability is 0 long before).
    """

    top_k: int
    vocabulary: int
    temperature: float = 1.0
    kind = "top_k"
    shape = ()
    needs_head = True

    def __str__(self) -> str:
        return f"the {self.top_k} largest log-probabilities at temperature {self.temperature:g}"

    @property
    def dtype(self) -> np.dtype:
        """Returns the numpy type of one token's row."""
        return np.dtype([("ids", "<i4", (self.top_k,)), ("log_probs", "<f2", (self.top_k,)), ("log_tail", "<f4")])

    @property
    def size(self) -> int:
        """Returns the bytes of a token."""
        return 6 * self.top_k + 4

    def header(self) -> dict[str, Any]:
        """Returns its keys in the cache's header."""
        return {
            "kind": self.kind,
            "top_k": self.top_k,
            "temperature": self.temperature,
            "vocabulary": self.vocabulary,
            "dtype": "float16",
        }

    def encode(self, hidden: Tensor, head: Head | None = None) -> np.ndarray:
        """Encodes final hidden states with the teacher's head, (M, d) -> (M,) of `dtype`."""
        assert head is not None
        top = top_log_probs(
            hidden.to(head.weight.device),
            head.weight.detach(),
            k=self.top_k,
            temperature=self.temperature,
            bias=None if head.bias is None else head.bias.detach(),
            scale=head.scale,
            softcap=head.softcap,
        )
        rows = np.empty(len(hidden), dtype=self.dtype)
        rows["ids"] = top.ids.cpu().numpy()
        rows["log_probs"] = top.log_probs.clamp_min(torch.finfo(torch.float16).min).half().cpu().numpy()
        rows["log_tail"] = top.log_tail.float().cpu().numpy()
        return rows

    def decode(self, rows: np.ndarray) -> TopLogProbs:
        """Decodes rows to (M, K) int32, (M, K) float16, (M,) float32 on the CPU."""
        kinds = (("ids", np.int32), ("log_probs", np.float16), ("log_tail", np.float32))
        # copied: of a single row numpy takes any strides for contiguous ones, torch does not
        return TopLogProbs(*(torch.from_numpy(np.array(rows[name], dtype=kind, order="C")) for name, kind in kinds))


Rows = HiddenRows | TopRows
Teacher = Tensor | TopLogProbs  # what the loss takes of one


def placed(rows: Teacher, counted: Tensor, device: torch.device) -> Teacher:
    """Puts each tensor (M, ...) of `rows` into one of (B, L, ...) on `device`, zero where `counted` is not set."""
    where = counted.to(device)

    def place(x: Tensor) -> Tensor:
        out = torch.zeros((*counted.shape, *x.shape[1:]), dtype=x.dtype, device=device)
        out[where] = x.to(device)
        return out

    return TopLogProbs(*map(place, rows)) if isinstance(rows, TopLogProbs) else place(rows)


@dataclass(frozen=True)
class RowChoice:
    """What decides which of the two a cache holds: the setting, else what the directory holds, else the size.

    Args:
        hidden_size, vocabulary: d and V of the teacher.
        top_k: `teacher_cache_top_k`: None = by size, 0 = hidden states, n = the n largest log-probabilities.
        temperature, form: Of the consistency term.
    """

    hidden_size: int
    vocabulary: int
    top_k: int | None = None
    temperature: float = 1.0
    form: str = "kl"

    def asked(self) -> Rows | None:
        """Returns what the setting says; None: nothing."""
        if self.top_k is None:
            return None
        return self._top(self.top_k) if self.top_k else HiddenRows(self.hidden_size)

    @property
    def hidden_tokens(self) -> int:
        """Returns for how many tokens hidden states are kept unasked; more need not be counted."""
        return int(HIDDEN_LIMIT) // HiddenRows(self.hidden_size).size

    def by_size(self, tokens: int | None) -> tuple[Rows, str]:
        """Decides for so many counted tokens (None: unknown), and says why.

        Hidden states, while they stay below HIDDEN_LIMIT.
        """
        hidden, top = HiddenRows(self.hidden_size), self._top(AUTOMATIC_TOP_K)
        limit = f"{HIDDEN_LIMIT / 1e9:g} GB"
        if self.form not in TOP_FORMS:
            return hidden, f"consistency={self.form!r} needs them"
        if tokens is None:
            return hidden, "how many tokens there are is not known"
        if tokens <= self.hidden_tokens:
            return hidden, f"{tokens} tokens take {tokens * hidden.size / 1e9:.3g} GB, at most {limit}"
        if top.size >= hidden.size:
            return hidden, f"smaller than {top}"
        return top, f"hidden states would take more than {limit}"

    def stored(self, header: dict[str, Any], directory: object) -> Rows:
        """Returns what the cache with this header holds.

        Raises:
            ValueError: it does not fit the teacher, the setting or the consistency term; names both and the remedy.
        """
        there = f"teacher_cache={directory}"
        rows: Rows = HiddenRows(self.hidden_size)
        if header.get("kind") == TopRows.kind:
            rows = self._stored_top(header, there)
        for key, value in rows.header().items():
            if header.get(key) != value:
                raise ValueError(
                    f"{there} was made with another {key.replace('_', ' ')}: {header.get(key)}, here {value}. Name "
                    "another directory, or delete this one."
                )
        asked = self.asked()
        if asked is not None and (asked.kind, asked.size) != (rows.kind, rows.size):
            raise ValueError(
                f"teacher_cache_top_k={self.top_k} contradicts {there}, which holds {rows}: leave teacher_cache_top_k "
                "out to use it, or name another directory."
            )
        if isinstance(rows, TopRows):
            self._check_term(rows, there)
        return rows

    def _stored_top(self, header: dict[str, Any], there: str) -> TopRows:
        k, temperature = header.get("top_k"), header.get("temperature")
        if not isinstance(k, int) or not 1 <= k <= max(self.vocabulary, 1) or not isinstance(temperature, (int, float)):
            raise ValueError(
                f"{there} was made with top_k={k} and temperature={temperature}, which fits no teacher with "
                f"{self.vocabulary} tokens: name another directory, or delete this one."
            )
        return TopRows(k, self.vocabulary, float(temperature))

    def _check_term(self, rows: TopRows, there: str) -> None:
        remedy = "name another directory (teacher_cache_top_k=0 there serves every form and temperature)"
        if self.form not in TOP_FORMS:
            raise ValueError(
                f"consistency={self.form!r} needs all logits of the teacher, but {there} holds {rows}: {remedy}."
            )
        if rows.temperature != self.temperature:
            raise ValueError(
                f"temperature={self.temperature:g} contradicts {there}, which holds {rows}: write "
                f"temperature={rows.temperature:g}, or {remedy}."
            )

    def _top(self, k: int) -> TopRows:
        return TopRows(min(k, self.vocabulary), self.vocabulary, float(self.temperature))
