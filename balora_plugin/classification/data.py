"""Samples for classification: which columns hold text and label, and their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# the columns of GLUE and its like; the first that a dataset has are taken
TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("sentence",),
    ("text",),
)
LABEL_COLUMNS = ("label", "labels")


def columns_of(names: Sequence[str], where: str) -> tuple[tuple[str, ...], str]:
    """Returns the text column, or pair of them, and the label column of a dataset with the columns `names`.

    Raises:
        ValueError: none is known; `where` says of which dataset.
    """
    text = next((columns for columns in TEXT_COLUMNS if set(columns) <= set(names)), None)
    label = next((column for column in LABEL_COLUMNS if column in names), None)
    if text is None or label is None:
        known = "; ".join(", ".join(columns) for columns in TEXT_COLUMNS)
        raise ValueError(
            f"{where} has the columns {', '.join(names)}: no {'text' if text is None else 'label'} column is known by "
            f"name ({known}; {', '.join(LABEL_COLUMNS)}). Name them, or rename the columns."
        )
    return text, label


def tokenised(
    dataset: Any, tokenizer: Any, columns: Sequence[str], label: str, *, max_length: int, num_labels: int, where: str
) -> Any:
    """Returns a `datasets.Dataset` of input_ids, attention_mask (token_type_ids where the model has them) and labels.

    A pair is cut at its longer side first. Labels become whole numbers, or floats where num_labels is 1 (regression).

    Raises:
        ValueError: a label that is no class of this model, or text that is none.
    """
    check_labels(dataset[label], num_labels, where)
    kind = float if num_labels == 1 else int

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[column] for column in columns]
        for column, values in zip(columns, texts, strict=True):
            if not all(isinstance(value, str) for value in values):
                raise ValueError(f"{where}: column {column!r} holds something else than text.")
        encoded: dict[str, Any] = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        encoded["labels"] = [kind(value) for value in rows[label]]
        return encoded

    return dataset.map(encode, batched=True, remove_columns=dataset.column_names)


def check_labels(values: Sequence[Any], num_labels: int, where: str) -> None:
    """Refuses labels that are no class of a classifier with so many outputs (1: any number).

    Raises:
        ValueError: the first of them, and what to do.
    """
    for row, value in enumerate(values):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if num_labels == 1 and number:
            continue
        if number and int(value) == value and 0 <= value < num_labels:
            continue
        hint = " (the test splits of GLUE have none: take the validation split)" if value == -1 else ""
        hint = ": remove such rows" if isinstance(value, float) and not math.isfinite(value) else hint
        expected = "a finite number" if num_labels == 1 else f"a whole number from 0 to {num_labels - 1}"
        raise ValueError(f"{where}, row {row}: label {value!r} is not {expected}, with num_labels={num_labels}{hint}.")
