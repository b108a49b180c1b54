"""Rows of a micro-batch for themselves: what the teacher is given where it meets some of them alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..fused.loss import IGNORED, MetRows
from .batches import main_input

_NO_INPUT = {"labels", "shift_labels", "num_items_in_batch"}
_BY_ROW = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"}
_PLAIN = (bool, int, float, str, type(None))


def rows_apart(inputs: dict[str, Any]) -> int:
    """Returns how many rows of a batch a model can be given each without the others.

    1 for a batch that is one whole: a single row, or tensors that are of no row (images, edges of packed documents).

    Args:
        inputs: A model's keywords, input_ids (B, L) or inputs_embeds (B, L, d) among them.
    """
    rows = int(main_input(inputs).shape[0])
    given = {name: value for name, value in inputs.items() if name not in _NO_INPUT}
    return rows if all(_is_by_row(name, value, rows) for name, value in given.items()) else 1


def only_rows(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Returns a batch's inputs for some of its rows alone: each with what it had, padding too.

    Args:
        inputs: A backbone's keywords; all rows, or those of a batch that [`rows_apart`] can take apart.
        rows: (k,) int64, in order, on any device.
    """
    count = int(main_input(inputs).shape[0])
    if len(rows) == count:
        return inputs
    return {name: _of_rows(name, value, rows, count) for name, value in inputs.items()}


def met_rows(rows: tuple[int, ...] | None, inputs: dict[str, Any]) -> MetRows | None:
    """Returns which rows of a batch meet the teacher as tensors on its device; None: all of them.

    Args:
        rows: In order, each once.
        inputs: With input_ids (B, L) or inputs_embeds (B, L, d).
    """
    if rows is None:
        return None
    main = main_input(inputs)
    others = [row for row in range(main.shape[0]) if row not in rows]
    return MetRows(*(torch.tensor(each, dtype=torch.int64, device=main.device) for each in (list(rows), others)))


def rows_run(inputs: dict[str, Any], met: MetRows) -> Tensor:
    """Returns the rows of a batch that a teacher has to run on, (k,) int64: those that are met, if they can be.

    All of a batch that cannot be taken apart; the first where the teacher runs for the other processes' sake.
    """
    if rows_apart(inputs) == 1:
        return torch.arange(main_input(inputs).shape[0], device=met.met.device)
    return met.met if len(met.met) else torch.zeros_like(met.others[:1])


def counted_with_teacher(targets: Tensor, met: MetRows | None) -> Tensor | None:
    """Returns how many counted targets of a batch, (B, ...), the teacher was met at, 0-d; None: at all of them."""
    return None if met is None else (of_rows(targets, met.met) != IGNORED).sum()


def of_rows(value: Tensor, rows: Tensor) -> Tensor:
    """(B, ...) -> (k, ...): some rows, on any device."""
    return value.index_select(0, rows.to(value.device))


def _is_by_row(name: str, value: Any, rows: int) -> bool:
    if not isinstance(value, Tensor):
        return isinstance(value, _PLAIN)
    return name in _BY_ROW and value.ndim >= 2 and value.shape[_dimension(name, value)] in (1, rows)


def _of_rows(name: str, value: Any, rows: Tensor, count: int) -> Any:
    if not isinstance(value, Tensor) or value.shape[_dimension(name, value)] != count:
        return value  # the same for all rows
    return value.index_select(_dimension(name, value), rows.to(value.device))


def _dimension(name: str, value: Tensor) -> int:
    """Of the rows: (B, L, ...); positions of text and images are ([3,] B, L)."""
    return value.ndim - 2 if name == "position_ids" else 0
