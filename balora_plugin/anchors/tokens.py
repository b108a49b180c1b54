"""Anchors as token ids, none longer than a run's rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ..settings import described
from .reading import Anchor, read_anchors
from .stream import shuffled

_HUGE = 1_000_000  # tokenizers without a limit have one of 1e30


def length_limit(given: int | None, tokenizer: Any, positions: int | None) -> int | None:
    """Returns the longest row: what the run's arguments say, else what the tokenizer or the model can take."""
    own = getattr(tokenizer, "model_max_length", None)
    limits = [given] if given else [limit for limit in (own, positions) if limit and limit < _HUGE]
    return min(limits, default=None)


def token_documents(
    data: Any, tokenizer: Any, *, limit: int | None, tokens: int | None
) -> tuple[list[np.ndarray], int]:
    """Returns documents as ids (n,) int64 in an order drawn once for all, and how many documents the data has.

    Args:
        data: As of [`read_anchors`].
        tokenizer: A transformers tokenizer; chats need its chat template.
        limit: Where a document is cut off; None: nowhere.
        tokens: Documents are left out once there are so many tokens; at least one is taken. None: all are taken.

    Raises:
        ValueError: as [`read_anchors`]; chats without a template; no document with a token.
    """
    anchors = list(read_anchors(data))
    where = f"anchor_data={described(data)!r}"
    order = (anchors[index] for index in shuffled(len(anchors), "anchors"))
    found: list[np.ndarray] = []
    total = 0
    for ids in _encoded(order, tokenizer, limit, where):
        if not len(ids):
            continue
        total += len(ids)
        if found and tokens is not None and total > tokens:
            break
        found.append(np.asarray(ids, dtype=np.int64))
    if not found:
        raise ValueError(f"{where} holds no token: name a file with at least one document, or leave anchor_data out.")
    return found, len(anchors)


def _encoded(anchors: Iterable[Anchor], tokenizer: Any, limit: int | None, where: str) -> Iterator[list[int]]:
    cut = {"truncation": True, "max_length": limit} if limit else {}
    for anchor in anchors:
        chat = not isinstance(anchor.content, str)
        text = _rendered(anchor, tokenizer, where) if chat else anchor.content
        yield tokenizer(text, add_special_tokens=not chat, **cut)["input_ids"]


def _rendered(anchor: Anchor, tokenizer: Any, where: str) -> str:
    """A chat as its template writes it, special tokens included."""
    try:
        return tokenizer.apply_chat_template(anchor.content, tokenize=False, add_generation_prompt=anchor.prompt)
    except Exception as error:  # a template raises what it likes
        why = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{where} holds chats, which the tokenizer's chat template cannot write ({why}): give it one "
            "(tokenizer.chat_template), or name data with a column text."
        ) from None
