"""The nine tasks of GLUE, the sets of GLUE-X that their models are tested on, and labels from one to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METHODS = ("ba_lora", "pissa", "lora", "full")  # what a task is trained by
RECIPES = ("bert-large", "deberta-v3-base", "gpt2-xl", "roberta-large")  # the files of recipes/

# What the classes of a kind of task are called, in GLUE's order, with other sets' words for them.
LABELS: dict[str, tuple[tuple[str, ...], ...]] = {
    "nli3": (("entailment",), ("neutral",), ("contradiction",)),
    "nli2": (("entailment", "entails"), ("not_entailment", "non-entailment", "neutral", "contradiction")),
    "qnli": (("entailment",), ("not_entailment", "non-entailment")),
    "paraphrase": (("not_equivalent", "not_duplicate", "not_paraphrase"), ("equivalent", "duplicate", "paraphrase")),
    "sentiment": (("negative",), ("positive",)),
    "acceptability": (("unacceptable",), ("acceptable",)),
}
# The class that says "follows" or "means the same": what NLI and paraphrase sets have in common.
_YES = {"nli3": 0, "nli2": 0, "qnli": 0, "paraphrase": 1}


@dataclass(frozen=True)
class Task:
    """One task of GLUE. `kind`: a key of LABELS, or "similarity" (a score from 0 to 5); `scores`: the first counts."""

    name: str
    kind: str
    scores: tuple[str, ...]
    splits: tuple[str, ...] = ("validation",)

    @property
    def num_labels(self) -> int:
        """Returns the number of a model's outputs: its classes, or 1 for a score."""
        return 1 if self.kind == "similarity" else len(LABELS[self.kind])


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mnli", "nli3", ("accuracy",), ("validation_matched", "validation_mismatched")),
        Task("sst2", "sentiment", ("accuracy",)),
        Task("mrpc", "paraphrase", ("accuracy", "f1")),
        Task("cola", "acceptability", ("matthews",)),
        Task("qnli", "qnli", ("accuracy",)),
        Task("qqp", "paraphrase", ("accuracy", "f1")),
        Task("rte", "nli2", ("accuracy",)),
        Task("stsb", "similarity", ("pearson", "spearman")),
        Task("wnli", "nli2", ("accuracy",)),
    )
}

# task -> its sets in GLUE-X, as {name of the file: kind of its labels}
GLUE_X: dict[str, dict[str, str]] = {
    "mnli": {"mnli_mismatched": "nli3", "snli": "nli3", "sick": "nli3"},
    "stsb": {"sick_relatedness": "similarity"},
    "rte": {"mrpc": "paraphrase", "qqp": "paraphrase", "hans": "nli2", "scitail": "nli2"},
    "mrpc": {"qqp": "paraphrase", "rte": "nli2", "hans": "nli2", "twitter": "paraphrase"},
    "qnli": {"newsqa": "qnli"},
    "qqp": {"mrpc": "paraphrase", "rte": "nli2", "hans": "nli2", "twitter": "paraphrase"},
    "sst2": dict.fromkeys(("imdb", "yelp", "amazon", "flipkart"), "sentiment"),
    "cola": {"grammar": "acceptability"},
}


def label_of(value: Any, kind: str) -> int | float | None:
    """Returns a label of a file, number or word, as a class of `kind`; None without a gold label (-1, "-").

    Raises:
        ValueError: it is neither.

    >>> label_of("non-entailment", "nli2"), label_of(2, "nli3"), label_of("-", "nli3")
    (1, 2, None)
    """
    if value is None or value in (-1, "-1", "-"):
        return None
    if kind == "similarity":
        return float(value)
    classes = LABELS[kind]
    if isinstance(value, str):
        word = value.strip().lower().replace(" ", "_")
        for index, words in enumerate(classes):
            if word in words:
                return index
    elif not isinstance(value, bool) and int(value) == value and 0 <= value < len(classes):
        return int(value)
    raise ValueError(f"label {value!r} is none of {', '.join(f'{i} ({words[0]})' for i, words in enumerate(classes))}.")


def positive_class(kind: str) -> int:
    """Returns the class whose F1 counts: the one that says "follows" or "means the same", else 1."""
    return _YES.get(kind, 1)


def comparable(found: Sequence[int], gold: Sequence[int], model: str, data: str) -> tuple[list[int], list[int]]:
    """Returns predictions of a model of one kind and labels of another kind, both as classes of the data's kind.

    The same kind: as they are. Three-way labels with a two-way model: neutral and contradiction are "does not follow",
    as are a three-way model's predictions on two-way labels. NLI and paraphrase: "follows" is "means the same".

    >>> comparable([0, 1], [1, 0], "nli2", "paraphrase")
    ([1, 0], [1, 0])
    >>> comparable([0, 1, 2], [0, 1, 1], "nli3", "nli2")
    ([0, 1, 1], [0, 1, 1])
    """
    if model == data:
        return list(found), list(gold)
    if model not in _YES or data not in _YES:
        raise ValueError(f"a model of {model} labels says nothing on a set of {data} labels.")
    target = "nli2" if data == "nli3" else data
    yes = _YES[target]
    return [yes if x == _YES[model] else 1 - yes for x in found], [yes if x == _YES[data] else 1 - yes for x in gold]
