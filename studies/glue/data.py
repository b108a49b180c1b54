"""GLUE's tasks cut to the study's sizes, and what noise and imbalance make of a training set."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from balora_plugin.classification.data import columns_of, tokenised
from balora_plugin.glue.data import read_split
from balora_plugin.glue.tasks import TASKS as GLUE_TASKS

NOISE = 0.4
IMBALANCE = 20
GROUPED = 8  # batches that are sorted by length together

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskData:
    """Encoded rows of a task: `train` to train on, `held_out` of the same set to tune on, `test` to report."""

    name: str
    train: list[Row]
    held_out: list[Row]
    test: list[Row]

    @property
    def num_labels(self) -> int:
        """Classes of the task."""
        return GLUE_TASKS[self.name].num_labels

    @property
    def score(self) -> str:
        """The score that GLUE reports: accuracy or matthews."""
        return GLUE_TASKS[self.name].scores[0]

    @property
    def minority(self) -> int:
        """The class that is made rare under imbalance: the rarer one of the training set; of equals the first."""
        counts = Counter(row["labels"] for row in self.train)
        return min(sorted(counts), key=lambda label: counts[label])


def task_data(name: str, directory: str | None, tokenizer: Any, sizes: Any) -> TaskData:
    """Reads a task from `directory`, or the hub, and draws its fixed parts, the same for all seeds."""
    train = encoded(name, "train", directory, tokenizer, (sizes.pool, sizes.length))
    test = encoded(name, "validation", directory, tokenizer, (sizes.test, sizes.length))
    return TaskData(name, train[sizes.held_out :], train[: sizes.held_out], test)


def encoded(name: str, split: str, directory: str | None, tokenizer: Any, size: tuple[int, int]) -> list[Row]:
    """So many rows of a split, drawn once and for all, cut at so many tokens."""
    count, length = size
    task = GLUE_TASKS[name]
    table: Any = read_split(task, split, directory)
    table = table.select(random.Random(0).sample(range(len(table)), min(count, len(table))))
    where = f"{name} {split}"
    text, label = columns_of(table.column_names, where)
    made = tokenised(table, tokenizer, text, label, max_length=length, num_labels=task.num_labels, where=where)
    rows: list[Row] = made.to_list()
    return rows


def training_rows(data: TaskData, setting: str, seed: int, count: int, batch: int) -> list[Row]:
    """The rows that a seed trains on, in its order; all methods of a seed see the same.

    Whole passes over the setting's training set, in batches of like length. `noise`: exactly NOISE of all rows have
    another class; `imbalance`: the minority class is cut to 1 / IMBALANCE of the largest.
    """
    rng = random.Random(seed)
    rows = list(data.train)
    if setting == "noise":
        rows = with_noise(rows, data.num_labels, rng)
    if setting == "imbalance":
        rows = with_imbalance(rows, data.minority, rng)
    drawn: list[Row] = []
    while len(drawn) < count:
        drawn += rng.sample(rows, len(rows))
    return in_like_batches(drawn[:count], batch, rng)


def with_noise(rows: Sequence[Row], classes: int, rng: random.Random) -> list[Row]:
    """The rows with exactly NOISE of them (rounded) under another class, each wrong one equally likely."""
    wrong = set(rng.sample(range(len(rows)), round(NOISE * len(rows))))
    return [
        {**row, "labels": rng.choice([label for label in range(classes) if label != row["labels"]])}
        if index in wrong
        else row
        for index, row in enumerate(rows)
    ]


def with_imbalance(rows: Sequence[Row], minority: int, rng: random.Random) -> list[Row]:
    """The rows with one class cut to 1 / IMBALANCE of the largest."""
    largest = max(Counter(row["labels"] for row in rows).values())
    few = [row for row in rows if row["labels"] == minority]
    return [row for row in rows if row["labels"] != minority] + rng.sample(few, max(1, largest // IMBALANCE))


def in_like_batches(rows: Sequence[Row], batch: int, rng: random.Random) -> list[Row]:
    """The rows in an order whose batches have rows of like length: short ones cost little padding."""
    batches: list[list[Row]] = []
    for start in range(0, len(rows), GROUPED * batch):
        group = sorted(rows[start : start + GROUPED * batch], key=lambda row: len(row["input_ids"]))
        batches += [group[place : place + batch] for place in range(0, len(group), batch)]
    rng.shuffle(batches)
    return [row for one in batches for row in one]
