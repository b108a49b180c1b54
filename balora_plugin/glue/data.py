"""GLUE's splits from the hub or from JSONL files here, and GLUE-X's sets from JSONL files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from ..classification.data import columns_of
from .tasks import TASKS, Task, label_of

HUB = "nyu-mll/glue"


@runtime_checkable
class SampleTable(Protocol):
    """What is used of a `datasets.Dataset`."""

    @property
    def column_names(self) -> list[str]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any) -> Any: ...
    def select(self, indices: Iterable[int]) -> SampleTable: ...
    def remove_columns(self, column_names: str | list[str]) -> SampleTable: ...


def read_split(task: Task, split: str, directory: str | None, limit: int = 0) -> SampleTable:
    """Reads a split as a `datasets.Dataset` of text columns and `label`, from JSONL files or the hub.

    The file is `<directory>/<task>/<split>.jsonl`.

    `limit` > 0: its first rows alone.

    Raises:
        ValueError: no such file, or one with other labels.
    """
    if directory is None:
        from datasets import load_dataset

        table: SampleTable = load_dataset(HUB, task.name, split=split)
        return table.select(range(min(limit, len(table)))) if limit else table
    path = os.path.join(directory, task.name, f"{split}.jsonl")
    if not os.path.isfile(path):
        raise ValueError(
            f"--data {directory} has no {task.name}/{split}.jsonl: it holds one directory a task ({', '.join(TASKS)}), "
            "with train.jsonl and validation.jsonl (mnli: validation_matched.jsonl, validation_mismatched.jsonl)."
        )
    table, dropped = read_jsonl(path, task.kind, limit)
    if dropped:
        raise ValueError(f"{path}: {dropped} rows have no label (-1 or '-'): take another split, or remove them.")
    return table


def read_jsonl(path: str, kind: str, limit: int = 0) -> tuple[SampleTable, int]:
    """Reads a file of one JSON object a line; returns (dataset, rows left out for want of a gold label).

    Text columns as in GLUE or `sentence` / `sentence1`, `sentence2`; `label` a number or a word of `kind`.

    Raises:
        ValueError: a line that is no such object; names it.
    """
    from datasets import Dataset

    rows: list[dict[str, Any]] = []
    dropped = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if limit and len(rows) >= limit:
                break
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
                label = label_of(row["label"], kind)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{where}: {error}" if str(error) else f"{where} is no JSON object.") from None
            if label is None:
                dropped += 1
                continue
            text, _ = columns_of(list(row), where)
            rows.append({**{column: row[column] for column in text}, "label": label})
    if not rows:
        raise ValueError(f"{path} holds no row with a label.")
    return Dataset.from_list(rows), dropped
