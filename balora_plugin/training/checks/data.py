"""Refusals of training data from which nothing could be learnt, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ...config import RegularizerConfig
from .token_ids import check_row

_IGNORED = -100


def check_rows(dataset: Any) -> None:
    """Refuses training data without a row; what has no length is not looked at.

    Raises:
        ValueError: names the usual reasons.
    """
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(
            "train_dataset has no rows: look for a filter that drops all of them, such as one by length (sequence_len "
            "in Axolotl; TRL drops rows whose answer max_length cuts off), or an empty split."
        )


def has_images(dataset: Any) -> bool:
    """Returns whether the first row of the data names images, as TRL's trainers ask it."""
    first = next(iter(dataset), None) if isinstance(dataset, Iterable) else None
    return isinstance(first, Mapping) and ("image" in first or "images" in first)


def check_cacheable(dataset: Any, regularizers: RegularizerConfig) -> None:
    """Refuses images beside a teacher cache, which knows a document by its tokens: those of two images are the same.

    Raises:
        ValueError: names the setting and what to write.
    """
    if regularizers.teacher_cache is not None and has_images(dataset):
        raise ValueError(
            f"teacher_cache={regularizers.teacher_cache!r} with images in the data: it knows a document by its tokens, "
            "and every image has the same ones. Remove teacher_cache; teacher_interval saves time instead."
        )


def check_data(dataset: Any, task: str, config: Any) -> None:
    """Refuses training data from which a model of this `config` could learn nothing; `task`: "nlg" or "nlu".

    Raises:
        ValueError: names what it lacks.
    """
    if task == "nlu":
        check_classes(dataset, config)
    else:
        check_counted(dataset)


def check_classes(dataset: Any, config: Any) -> None:
    """Refuses a classifier's training data without rows, whose first label is text, or with labels of no class.

    `config`: the model's. The whole column is read: a class that the model has not stops an accelerator without a word
    of what it was.

    Raises:
        ValueError: names the label and what to write.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return
    check_rows(dataset)
    row = dataset[0]
    check_row(row, 0)
    for name in ("labels", "label"):  # a collator renames the second
        if isinstance(row, Mapping) and row.get(name) is not None:
            _check_numbers(row[name], 0)
            single = config.problem_type in (None, "single_label_classification") and config.num_labels > 1
            if single and isinstance(row[name], int) and hasattr(dataset, "unique"):
                _check_range(name, dataset.unique(name), config.num_labels)


def _check_range(name: str, found: Sequence[int | None], classes: int) -> None:
    wrong = [value for value in found if value is None or not (0 <= value < classes or value == _IGNORED)]
    if wrong:
        raise ValueError(
            f"{name}: {wrong[0]} in the training data is no class of this model, which has num_labels={classes}: write "
            f"whole numbers from 0 to {classes - 1}, or load it with another num_labels."
        )
    if all(value == _IGNORED for value in found):
        raise ValueError(f"{name}: all are {_IGNORED} in the training data, so no sample counts: write their classes.")


def check_counted(dataset: Any) -> None:
    """Refuses training data without rows, with labels that are text, or of which no label counts: nothing would train.

    Reads rows until one counts, which where all is well is the first; streams, and rows without labels, are not read.

    Raises:
        ValueError: names the labels and the usual reasons.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return
    check_rows(dataset)
    for index in range(len(dataset)):
        row = dataset[index]
        check_row(row, index)
        if _counts(row, index):
            return
    raise ValueError(
        f"labels: all are -100 in all {len(dataset)} rows of the training data, so no token counts: look for a "
        "chat template that marks no answer, for prompts longer than the sequence length, or train on the prompts "
        "too (train_on_inputs: true; completion_only_loss=False)."
    )


def _counts(row: Any, index: int) -> bool:
    """Returns whether a row has a position that counts; True where it does not say."""
    labels = row.get("labels") if isinstance(row, Mapping) else None
    if labels is None:
        return True
    _check_numbers(labels, index)
    labels = torch.as_tensor(labels)
    return labels.ndim != 1 or not labels.numel() or bool(labels[1:].ne(-100).any())


def _check_numbers(labels: Any, index: int) -> None:
    """Refuses labels that are text, of which a collator makes no tensor."""
    if isinstance(labels, str) or (isinstance(labels, Sequence) and any(isinstance(each, str) for each in labels)):
        raise ValueError(
            f"labels: row {index} of the training data holds text ({str(labels)[:40]!r}): write each class as a whole "
            "number from 0 to num_labels - 1 (datasets: class_encode_column), or tokenise it for a language model."
        )
