"""Refusals of token ids that no row of the embedding answers to, where torch would speak of its kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ...pretrained.backbone import is_multimodal


class Fed(Protocol):
    """A run, as far as its batches go: its model, and the ids of the one that was begun last."""

    model: Any
    ids: Tensor | None


class _Host(Protocol):
    @property
    def ba_lora_run(self) -> Fed | None:
        """The run's state; None without terms."""


def check_ids(ids: Tensor, model: Any) -> None:
    """Refuses ids (B, L) that are no whole numbers, negative, or beyond the model's embedding; waits for the device.

    Of a multimodal model, which replaces some before the embedding sees them, the kind of number alone.

    Raises:
        ValueError: names input_ids, the first wrong one with its row, and the usual reason.
    """
    if ids.is_floating_point() or ids.dtype == torch.bool:
        empty = ", as rows without a single token give" if not ids.numel() else ""
        raise ValueError(
            f"input_ids: a batch of {ids.dtype}{empty}: write each row as a list of whole numbers, at least one, and "
            "leave rows without text out."
        )
    if not ids.numel() or is_multimodal(model):
        return
    known = _vocabulary(model)
    wrong = (ids < 0) | (ids >= known) if known else ids < 0
    if bool(wrong.any()):
        row = int(wrong.any(dim=-1).nonzero()[0])
        raise ValueError(
            f"input_ids: {int(ids[wrong][0])} in row {row} of a batch is no token of {type(model).__name__}"
            f"{f', which has {known}' if known else ''}: tokenise with this model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer)) before the adapter is put on it (-100 is for labels alone)."
        )


def _vocabulary(model: Any) -> int:
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # CANINE hashes its ids
        return 0
    return int(getattr(embedding, "num_embeddings", 0) or getattr(model.config.get_text_config(), "vocab_size", 0))


@contextmanager
def explained(host: _Host) -> Iterator[None]:
    """Looks, where a pass failed, whether the ids of its batch are why: only then is the device waited for.

    Raises:
        ValueError: they are; of [`check_ids`].
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        run = host.ba_lora_run
        if run is None or run.ids is None or isinstance(error, torch.OutOfMemoryError):
            raise
        try:
            check_ids(run.ids, run.model)
        except (RuntimeError, IndexError):  # an accelerator that has failed answers nothing any more
            raise error from None
        raise


def check_row(row: Any, index: int) -> None:
    """Refuses a row of training data whose input_ids are booleans, or none; what is no list is not looked at.

    Raises:
        ValueError: names the row and what to write.
    """
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    if not isinstance(ids, (list, tuple)):
        return
    if not ids:
        raise ValueError(f"input_ids: row {index} of the training data is empty: leave rows without text out.")
    if any(isinstance(each, (bool, str)) for each in ids):
        raise ValueError(
            f"input_ids: row {index} of the training data holds {ids[:4]!r}: write each token as a whole number."
        )
