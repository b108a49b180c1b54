"""The settings of the three regularisers: presets, validation, resolution. No tensors here."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from .consistency import NAMES, form_named

Task = Literal["nlg", "nlu"]

PRESETS = ("paper", "iclr2026")
CHOICES: dict[str, tuple[str, ...]] = {
    "preset": PRESETS,
    "task": ("auto", "nlg", "nlu"),
    "consistency": NAMES,
    "svd_norm": ("nuclear", "frobenius", "none"),
    "svd_input": ("logits", "centered_logits", "features"),
    "svd_layout": ("rows", "flattened"),
    "diversity_input": ("logits", "features"),
    "schedule": ("constant", "iclr2026"),
}

# What `None` means, per preset and task. `paper`: arXiv 2408.04556v2; `iclr2026`: the ICLR 2026 version of the same
# paper. Neither publishes everything: k of `paper` and T of `iclr2026` are our choices (docs/method.md says why).
_PRESET_VALUES: dict[tuple[str, str], dict[str, Any]] = {
    ("paper", "nlg"): {
        "lambda_consistency": 1e-4,
        "lambda_diversity": 3e-4,
        "lambda_svd": 1e-4,
        "consistency": "kl",
        "temperature": 1.0,
        "diversity_top_k": 0,
        "svd_top_k": 10,
        "svd_norm": "nuclear",
        "schedule": "constant",
    },
    ("paper", "nlu"): {
        "lambda_consistency": 1e-4,
        "lambda_diversity": 4e-4,
        "lambda_svd": 1e-4,
        "consistency": "mse",
        "temperature": 1.0,
        "diversity_top_k": 0,
        "svd_top_k": 5,
        "svd_norm": "none",
        "schedule": "constant",
    },
    ("iclr2026", "nlg"): {
        "lambda_consistency": 0.025,
        "lambda_diversity": 0.005,
        "lambda_svd": 0.005,
        "consistency": "kl",
        "temperature": 2.0,
        "diversity_top_k": 20,
        "svd_top_k": 10,
        "svd_norm": "frobenius",
        "schedule": "iclr2026",
    },
    ("iclr2026", "nlu"): {
        "lambda_consistency": 0.15,
        "lambda_diversity": 0.03,
        "lambda_svd": 0.03,
        "consistency": "kl",
        "temperature": 2.0,
        "diversity_top_k": 0,
        "svd_top_k": 5,
        "svd_norm": "nuclear",
        "schedule": "iclr2026",
    },
}

# What says nothing in a family: (key, its values that do no harm there, why)
_OTHER_FAMILY: dict[str, tuple[tuple[str, tuple[Any, ...], str], ...]] = {
    "nlg": (
        ("diversity_input", ("logits",), "diversity is the entropy of the predictions there"),
        ("gather_batch_statistics", (False,), "only classification takes statistics over samples"),
        ("head_warmup_steps", (0,), "there is no new head to warm up"),
    ),
    "nlu": (
        ("diversity_top_k", (0,), "diversity is a covariance there, without a top k"),
        ("svd_layout", ("rows",), "a sample is one row there"),
        ("svd_max_rows", (0, 1024), "it bounds counted tokens, a batch of samples is small"),
        ("teacher_cache", (), "it keeps next-token outputs; the teacher of a classifier runs live"),
    ),
}


@dataclass
class RegularizerConfig:
    """Settings of the consistency, diversity and SVD terms of BA-LoRA.

    The loss is `task + lambda_consistency * CR + lambda_diversity * DR + lambda_svd * SVDR`. Every field left at None
    takes the value of `preset` for the task at hand; [`RegularizerConfig.resolved`] shows the result.

    Args:
        preset: `"paper"` (arXiv 2408.04556v2) or `"iclr2026"` (the ICLR 2026 version, with its schedules).
        task: `"nlg"` (terms over counted next-token positions), `"nlu"` (terms over samples) or `"auto"`: the trainer
            knows its model (a causal language model, or a *ForSequenceClassification).
        lambda_consistency: Weight of the distance to the pre-trained model, >= 0. 0 switches the term and the teacher's
            forward pass off.
        lambda_diversity: Weight of the diversity term (negative entropy; off-diagonal covariance for NLU), >= 0.
        lambda_svd: Weight of the singular-value term, >= 0.
        consistency: `"kl"` (teacher || student), `"reverse_kl"`, `"jsd"` (half / half) or `"mse"` (between
            L2-normalised rows of logits).
        temperature: Temperature T of the KL and JSD forms, which carry a factor T^2, > 0.
        diversity_top_k: Entropy over the student's K most likely tokens, renormalised; 0 means the full vocabulary.
        svd_top_k: The k largest singular values count as signal, >= 1.
        svd_norm: What their sum is divided by: `"nuclear"` (sum of all), `"frobenius"` or `"none"`.
        svd_input: The matrix: `"logits"`, `"centered_logits"` (rows minus their mean: invariant to a constant added to
            a row, as the probabilities are) or `"features"` (final hidden states; NLU: the one that the head reads).
        diversity_input: NLU: whose covariance: `"logits"`, or `"features"`, as for svd_input.
        svd_layout: `"rows"`: one row a counted token (or sample); `"flattened"`: one row a sample, B x (T * V).
        svd_max_rows: The spectrum of a micro-batch is taken over at most so many counted tokens, drawn anew at every
            step by the step's number; 0 = all. Its cost grows with the square of the rows (docs/design.md).
        schedule: `"constant"`, or `"iclr2026"`: lambda_consistency falls by a cosine to a tenth; the other two are 0
            for the first 20 % of the optimizer steps, then rise linearly over 5 %.
        teacher_interval: Run the teacher on every n-th micro-batch, with n times the weight (unbiased in expectation).
            1 = every micro-batch, exact.
        teacher_cache: Directory that keeps the teacher's outputs for each document: computed once, before the first
            step, and read in every later epoch and run. None: the teacher runs live.
        teacher_cache_top_k: What the cache keeps of a token. 0: its final hidden state, exact. n: the teacher's n
            largest log-probabilities (6 n + 4 bytes); the consistency term is then taken over n + 1 buckets, a lower
            bound of the whole one. None: what the directory holds; in an empty one hidden states while those of the
            training data stay below 50 GB, else 128 log-probabilities.
        gather_batch_statistics: NLU: covariance and spectrum over the samples of all data-parallel ranks together, not
            over each rank's own.
        head_warmup_steps: NLU: the first n optimizer steps train the classification head alone on the pre-trained
            features; the teacher then has that head, instead of the initial (usually random) one.
        share_interval: Measure each term's share of the gradient every n optimizer steps (`balora/share_*`); 0 = never.

    Raises:
        ValueError: for a value out of range or an unknown choice; names the key, the value and what to write.
        TypeError: for a value of the wrong type.

    Example:
        >>> terms = RegularizerConfig(preset="iclr2026", lambda_svd=0.0)
        >>> terms.resolved("nlg").temperature
        2.0
        >>> RegularizerConfig(lambda_svd=-1)
        Traceback (most recent call last):
        ...
        ValueError: lambda_svd=-1 must be a finite number >= 0.
    """

    preset: str = "paper"
    task: str = "auto"
    lambda_consistency: float | None = None
    lambda_diversity: float | None = None
    lambda_svd: float | None = None
    consistency: str | None = None
    temperature: float | None = None
    diversity_top_k: int | None = None
    svd_top_k: int | None = None
    svd_norm: str | None = None
    svd_input: str | None = None
    diversity_input: str | None = None
    svd_layout: str | None = None
    svd_max_rows: int = 1024
    schedule: str | None = None
    teacher_interval: int = 1
    teacher_cache: str | os.PathLike[str] | None = None
    teacher_cache_top_k: int | None = None
    gather_batch_statistics: bool = False
    head_warmup_steps: int = 0
    share_interval: int = 100

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            _check_choice(key, getattr(self, key), choices)
        for key in ("lambda_consistency", "lambda_diversity", "lambda_svd"):
            _check_number(key, getattr(self, key), minimum=0.0)
        _check_number("temperature", self.temperature, minimum=0.0, exclusive=True)
        _check_integer("diversity_top_k", self.diversity_top_k, minimum=0)
        _check_integer("svd_top_k", self.svd_top_k, minimum=1)
        _check_integer("svd_max_rows", self.svd_max_rows, minimum=0, optional=False)
        _check_integer("teacher_interval", self.teacher_interval, minimum=1, optional=False)
        _check_integer("head_warmup_steps", self.head_warmup_steps, minimum=0, optional=False)
        if not isinstance(self.gather_batch_statistics, bool):
            raise TypeError(f"gather_batch_statistics={self.gather_batch_statistics!r} must be True or False.")
        _check_integer("share_interval", self.share_interval, minimum=0, optional=False)
        if self.diversity_top_k == 1:
            raise ValueError("diversity_top_k=1 makes the entropy 0 by definition: write 0 (full vocabulary) or >= 2.")
        self.teacher_cache = as_path("teacher_cache", self.teacher_cache)
        _check_integer("teacher_cache_top_k", self.teacher_cache_top_k, minimum=0)
        if self.teacher_cache_top_k and self.teacher_cache is None:
            raise ValueError(
                f"teacher_cache_top_k={self.teacher_cache_top_k} without teacher_cache keeps nothing: write "
                "teacher_cache=<a directory>, or leave it out."
            )
        if self.teacher_cache_top_k and self.consistency and form_named(self.consistency).buckets is None:
            raise ValueError(
                f"teacher_cache_top_k={self.teacher_cache_top_k} with consistency={self.consistency!r}, which needs "
                "all logits of the teacher: write teacher_cache_top_k=0, or another form."
            )
        if self.svd_layout == "flattened" and self.svd_input == "centered_logits":
            raise ValueError(
                "svd_layout='flattened' with svd_input='centered_logits' is not defined: a flattened row holds many "
                "tokens. Use svd_layout='rows', or svd_input='logits'."
            )

    def resolved(self, task: str | None = None) -> RegularizerConfig:
        """Returns a copy with every None replaced by the preset's value for `task` ("nlg" or "nlu").

        `task` may be omitted if the config names one. A task here and another one in the config is a ValueError.
        """
        if task is None or task == "auto":
            task = self.task
        elif self.task not in ("auto", task):
            raise ValueError(f"task={self.task!r} in the config, but this trainer's model is for task={task!r}.")
        if task not in ("nlg", "nlu"):
            raise ValueError(f"task={task!r}: say 'nlg' or 'nlu', here or in RegularizerConfig(task=...).")
        for key, others, why in _OTHER_FAMILY[task]:
            value = getattr(self, key)
            if value is not None and value not in others:
                raise ValueError(f"{key}={value!r} with task={task!r}: {why}; leave it out.")
        values: dict[str, Any] = {"svd_input": "logits", "svd_layout": "rows", "diversity_input": "logits"}
        values |= _PRESET_VALUES[self.preset, task]
        filled = {key: value for key, value in values.items() if getattr(self, key) is None}
        return dataclasses.replace(self, task=task, **filled)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, None where the preset decides (JSON-ready)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RegularizerConfig:
        """Builds a config from plain values; an unknown key is a ValueError that lists the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown regulariser setting {unknown[0]!r}; known: {', '.join(known)}.")
        return cls(**values)


def as_path(key: str, value: Any) -> str | None:
    """A path as plain text, so that settings can be written to a file."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if path is None:
        return None
    if not isinstance(path, str):
        raise TypeError(f"{key}={value!r} must be a path, not {type(value).__name__}.")
    if not path.strip():
        raise ValueError(f"{key}={value!r} names nothing: write a path, or leave it out.")
    return path


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value is None and key not in ("preset", "task"):
        return
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{key}={value!r} is not known: write one of {', '.join(map(repr, choices))}.")


def _check_number(key: str, value: object, minimum: float, exclusive: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(value, str) else ""
        raise TypeError(f"{key}={value!r} must be a number, not {type(value).__name__}{hint}.")
    if not math.isfinite(value) or value < minimum or (exclusive and value == minimum):
        raise ValueError(f"{key}={value!r} must be a finite number {'>' if exclusive else '>='} {minimum:g}.")


def _check_integer(key: str, value: object, minimum: int, optional: bool = True) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{key}={value!r} must be a whole number, not {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{key}={value!r} must be >= {minimum}.")


def as_regularizers(value: Any) -> RegularizerConfig:
    """`value` as a RegularizerConfig; a dict of its fields works too."""
    if isinstance(value, dict):
        return RegularizerConfig.from_dict(value)
    if not isinstance(value, RegularizerConfig):
        raise TypeError(f"regularizers={value!r} must be a RegularizerConfig or a dict of its fields.")
    return value
