"""Rows of a JSONL file of the usual formats, told apart by their columns; standard library alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..classification.data import LABEL_COLUMNS, TEXT_COLUMNS

FORMATS = "`text`; `prompt`, `completion`; `messages`; `instruction` (`input`), `output`; `text`, `label`"
# the columns that say what a row is; the first that the first row has are taken
_LANGUAGE = {
    "messages": ("messages",),
    "pair": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Samples:
    """Rows of one kind.

    Attributes:
        task: "lm" or "classification".
        rows: Of language data each `{"text"}`, `{"prompt", "completion"}` (strings, or messages) or `{"messages"}`,
            as TRL takes them; of classification the text columns and `label`, the number of a class or a score.
        where: The file, for messages.
        columns: Of classification: the text column, or the two of a pair.
        classes: Of classification: the names of the classes; empty for scores.
    """

    task: str
    rows: list[dict[str, Any]]
    where: str
    columns: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Returns the number of a classifier's outputs: its classes, or 1 for scores."""
        return len(self.classes) or 1

    def with_rows(self, rows: list[dict[str, Any]]) -> Samples:
        """Returns the same with other rows."""
        return Samples(self.task, rows, self.where, self.columns, self.classes)


def read_samples(path: str) -> Samples:
    """Reads a JSONL file whose rows are all of one of the formats of `FORMATS`.

    A `label` beside text makes it classification: words and whole numbers are classes, in the order of their names or
    values; numbers with a fraction are scores.

    Raises:
        ValueError: no such file, a line that is no such row; names the file and the line.
    """
    rows = [*_lines(path)]
    if not rows:
        raise ValueError(f"{path} holds no row: write one JSON object a line.")
    first = rows[0][1]
    label = next((name for name in LABEL_COLUMNS if name in first), None)
    if label is not None:
        return _classification(path, rows, label)
    kind = next((kind for kind, columns in _LANGUAGE.items() if set(columns) <= set(first)), None)
    if kind is None:
        raise ValueError(f"{path}, line {rows[0][0]} has the columns {', '.join(first)}: write one of {FORMATS}.")
    return Samples("lm", [_language(kind, row, f"{path}, line {number}") for number, row in rows], path)


def _lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, row) of what is not blank."""
    if not Path(path).is_file():
        raise ValueError(f"--data {path} is no file: name a JSONL file, one JSON object a line.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--data {path} is no UTF-8 text: name a JSONL file.") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}. Write one JSON object a line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is a {type(row).__name__}: write one JSON object a line.")
        yield number, row


def _language(kind: str, row: dict[str, Any], where: str) -> dict[str, Any]:
    missing = [column for column in _LANGUAGE[kind] if column not in row]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}, which the first row has: write all rows in one format.")
    if kind == "messages":
        return {"messages": _messages(row["messages"], where)}
    if kind == "text":
        return {"text": _text(row, "text", where)}
    asked, answered = _LANGUAGE[kind]
    prompt, answer = _text(row, asked, where), _text(row, answered, where)
    if kind == "pair":
        return {"prompt": prompt, "completion": answer}
    given = _text(row, "input", where) if row.get("input") else ""
    asking = {"role": "user", "content": f"{prompt}\n\n{given}" if given else prompt}
    return {"prompt": [asking], "completion": [{"role": "assistant", "content": answer}]}


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {column!r} is {value!r:.60}, not text: write a string that is not empty.")
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: 'messages' is no list of messages: write [{{'role': ..., 'content': ...}}, ...].")
    for message in value:
        fine = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not fine or message.get("role") not in _ROLES:
            raise ValueError(
                f"{where}: {message!r:.60} is no message: write a role of {', '.join(_ROLES)}, and content."
            )
    if all(message["role"] != "assistant" for message in value):
        raise ValueError(f"{where}: no message is the assistant's: there is nothing to learn in it.")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _classification(path: str, rows: list[tuple[int, dict[str, Any]]], label: str) -> Samples:
    first = rows[0][1]
    columns = next((columns for columns in TEXT_COLUMNS if set(columns) <= set(first)), None)
    if columns is None:
        known = "; ".join(", ".join(columns) for columns in TEXT_COLUMNS)
        raise ValueError(f"{path} has a {label!r}, and no text column known by name: write one of {known}.")
    values = []
    for number, row in rows:
        where = f"{path}, line {number}"
        missing = [column for column in (*columns, label) if column not in row]
        if missing:
            raise ValueError(f"{where} has no {missing[0]!r}, which the first row has: write all rows in one format.")
        if isinstance(row[label], bool) or not isinstance(row[label], (str, int, float)):
            raise ValueError(f"{where}: {label!r} is {row[label]!r:.40}: write a class, by name or number, or a score.")
        if isinstance(row[label], float) and not math.isfinite(row[label]):
            raise ValueError(f"{where}: {label!r} is {row[label]!r}, no finite number: leave the row out.")
        values.append(row[label])
    classes = _classes(values, path)
    numbers = [classes.index(value) for value in values] if classes else [float(value) for value in values]
    made = [
        {**{column: _text(row, column, f"{path}, line {number}") for column in columns}, "label": value}
        for (number, row), value in zip(rows, numbers, strict=True)
    ]
    return Samples("classification", made, path, columns, tuple(str(name) for name in classes))


def _classes(values: list[Any], path: str) -> list[Any]:
    """The classes in order; none where the values are scores."""
    words = [isinstance(value, str) for value in values]
    if any(words) and not all(words):
        raise ValueError(f"{path}: labels are words and numbers: write all in one way.")
    if not all(words) and any(float(value) != int(value) for value in values):
        return []
    found = sorted(set(values))
    if len(found) < 2:
        raise ValueError(f"{path}: every label is {found[0]!r}: there is no second class to tell it from.")
    return found
