"""The settings of the three regularisers: presets, validation, resolution. No tensors here."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .consistency import NAMES, form_named
from .settings import TASKS, Only, described, documented, names_checked, setting, settings_of

PRESETS = ("paper", "iclr2026")
TERMS = ("consistency", "diversity", "svd")
LARGEST_WEIGHT = 1e6  # the task is long gone then, and gradients overflow in half precision

# What the starter, a migrated YAML and docs/choose.md write for a language model: on SmolLM2-135M the consistency term
# alone at 0.3 halves the drift on the task at nearly its loss, and the other two do not act at any published weight.
RECOMMENDED = {"lambda_consistency": 0.3, "lambda_diversity": 0.0, "lambda_svd": 0.0}
SEARCHED = {"lambda_consistency": 1.0, "consistency": "kl"}  # with drift_target: a start, and the budget's own form
RECOMMENDED_RATE = 1e-4  # of AdamW, for a PiSSA start with alpha = r; `python -m benchmarks.first_norms` measures it

_OTHER_NAMES = {  # the paper's numbers and letters, and what a term is made of
    "lambda_consistency": ("lambda1", "lambda_1", "lambda_cr", "lambda_kl", "lambda_kd", "kl_weight", "l1", "cr"),
    "lambda_diversity": ("lambda2", "lambda_2", "lambda_dr", "lambda_entropy", "entropy_weight", "l2", "dr"),
    "lambda_svd": ("lambda3", "lambda_3", "lambda_svdr", "lambda_spectral", "l3", "svdr"),
}


def nearest_setting(key: str, others: Sequence[str] = ()) -> str | None:
    """Returns the field of RegularizerConfig, or of `others`, that a misspelt one means; None: none is near."""
    for name, known in _OTHER_NAMES.items():
        if key.lower() in known:
            return name
    near = difflib.get_close_matches(key, [*settings_of(RegularizerConfig), *others], n=1)
    if near and key.startswith("lambda") and difflib.SequenceMatcher(None, key, near[0]).ratio() < 0.8:
        return "lambda_consistency, lambda_diversity or lambda_svd"
    return near[0] if near else None


def _no_setting(key: str) -> str:
    near = nearest_setting(key)
    hint = f"did you mean {near}?" if near else f"write one of {', '.join(settings_of(RegularizerConfig))}."
    return f"{key} is not a setting of RegularizerConfig: {hint}"


def _in_every_preset(value: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(PRESETS, (value, value))


@names_checked(_no_setting)
@documented
@dataclass
class RegularizerConfig:
    """Settings of the consistency, diversity and SVD terms of BA-LoRA.

    The loss is `task + lambda_consistency * CR + lambda_diversity * DR + lambda_svd * SVDR`. Every field left at None
    takes the value of `preset` for the task at hand; [`RegularizerConfig.resolved`] shows the result, and
    docs/settings.md has the values of all presets.

    Raises:
        ValueError: for a value out of range or an unknown choice; names the key, the value and what to write.
        TypeError: for a value of the wrong type.

    Examples:
        >>> terms = RegularizerConfig(preset="iclr2026", lambda_svd=0.0)
        >>> terms.resolved("nlg").temperature
        2.0
        >>> RegularizerConfig(lambda_svd=-1)
        Traceback (most recent call last):
        ...
        ValueError: lambda_svd=-1 must be a finite number from 0 to 1e+06.
    """

    # `presets` is {preset: (for language models, for classifiers)}. `paper`: arXiv 2408.04556v2; `iclr2026`: the ICLR
    # 2026 version of the same paper. Neither publishes everything: svd_top_k of `paper` and the temperature of
    # `iclr2026` are our choices (docs/method.md says why).
    preset: str = setting(
        "choice",
        "paper",
        choices=PRESETS,
        help="Whose values are taken for settings that are left out: `paper` (arXiv 2408.04556v2) or `iclr2026` (the "
        "ICLR 2026 version, with its schedules).",
    )
    task: str = setting(
        "choice",
        "auto",
        choices=("auto", "nlg", "nlu"),
        help="The family of terms: `nlg` (over counted next-token positions), `nlu` (over samples) or `auto`: the "
        "trainer knows its model (a causal language model, or a sequence classifier).",
    )
    lambda_consistency: float | None = setting(
        "number",
        None,
        minimum=0.0,
        maximum=LARGEST_WEIGHT,
        presets={"paper": (1e-4, 1e-4), "iclr2026": (0.025, 0.15)},
        help="Weight of the distance to the pre-trained model. 0 switches the term and the teacher's forward pass off.",
    )
    lambda_diversity: float | None = setting(
        "number",
        None,
        minimum=0.0,
        maximum=LARGEST_WEIGHT,
        presets={"paper": (3e-4, 4e-4), "iclr2026": (0.005, 0.03)},
        help="Weight of the diversity term: minus the predictions' entropy; for classifiers off-diagonal covariance.",
    )
    lambda_svd: float | None = setting(
        "number",
        None,
        minimum=0.0,
        maximum=LARGEST_WEIGHT,
        presets={"paper": (1e-4, 1e-4), "iclr2026": (0.005, 0.03)},
        help="Weight of the singular-value term: minus the share of the leading singular values.",
    )
    consistency: str | None = setting(
        "choice",
        None,
        choices=NAMES,
        presets={"paper": ("kl", "mse"), "iclr2026": ("kl", "kl")},
        help="Form of the consistency term: `kl` (teacher || student), `reverse_kl`, `jsd` (half / half) or `mse` "
        "(between L2-normalised rows of logits).",
    )
    temperature: float | None = setting(
        "number",
        None,
        # in float32 T^2 KL is 3 % off at 100 and a vocabulary of 32,000, twice itself at 1000, and below 0 further on;
        # below 0.01 gradients by the smallest probabilities are lost
        minimum=0.01,
        maximum=100.0,
        presets={"paper": (1.0, 1.0), "iclr2026": (2.0, 2.0)},
        help="Temperature T of the KL and JSD forms, which carry a factor T^2.",
    )
    diversity_top_k: int | None = setting(
        "integer",
        None,
        minimum=0,
        presets={"paper": (0, 0), "iclr2026": (20, 0)},
        only=Only("nlg", "diversity is a covariance there, without a top k", neutral=(0,)),
        help="Entropy over the student's K most likely tokens, renormalised; 0: over the full vocabulary.",
    )
    svd_top_k: int | None = setting(
        "integer",
        None,
        minimum=1,
        presets={"paper": (10, 5), "iclr2026": (10, 5)},
        help="The k largest singular values count as signal.",
    )
    svd_norm: str | None = setting(
        "choice",
        None,
        choices=("nuclear", "frobenius", "none"),
        presets={"paper": ("nuclear", "none"), "iclr2026": ("frobenius", "nuclear")},
        help="What the sum of the leading singular values is divided by: `nuclear` (of all), `frobenius` or `none`.",
    )
    svd_input: str | None = setting(
        "choice",
        None,
        choices=("logits", "centered_logits", "features"),
        presets=_in_every_preset("logits"),
        help="The matrix whose singular values are taken: `logits`, `centered_logits` (rows minus their mean: "
        "invariant to a constant added to a row, as the probabilities are) or `features` (final hidden states; of a "
        "classifier the one that the head reads).",
    )
    diversity_input: str | None = setting(
        "choice",
        None,
        choices=("logits", "features"),
        presets=_in_every_preset("logits"),
        only=Only("nlu", "diversity is the entropy of the predictions there", neutral=("logits",)),
        help="The matrix whose covariance is taken: `logits`, or `features`, as for svd_input.",
    )
    svd_layout: str | None = setting(
        "choice",
        None,
        choices=("rows", "flattened"),
        presets=_in_every_preset("rows"),
        only=Only("nlg", "a sample is one row there", neutral=("rows",)),
        help="`rows`: one row a counted token; `flattened`: one row a sample, B x (T * V).",
    )
    svd_max_rows: int = setting(
        "integer",
        1024,
        minimum=0,
        only=Only("nlg", "it bounds counted tokens, a batch of samples is small", neutral=(0,)),
        help="The spectrum of a micro-batch is taken over at most so many counted tokens, drawn anew at every step by "
        "the step's number; 0: over all. Its cost grows with the square of the rows (docs/design/fused.md).",
    )
    schedule: str | None = setting(
        "choice",
        None,
        choices=("constant", "iclr2026", "adaptive"),
        presets={"paper": ("constant", "constant"), "iclr2026": ("iclr2026", "iclr2026")},
        help="How the weights move: `constant`; `iclr2026`: lambda_consistency falls by a cosine to a tenth, the other "
        "two are 0 for the first 20 % of the optimizer steps, then rise linearly over 5 %; `adaptive`: "
        "lambda_consistency is higher where the teacher is sure, from a tenth at full entropy to all of it at none.",
    )
    drift_target: float | None = setting(
        "number",
        None,
        # below it is what float32 makes of a mean over probabilities; its weight goes up to 10 task losses over it
        minimum=1e-6,
        maximum=100.0,
        help="Hold the model at this distance from the pre-trained one, in nats per counted token (sample), KL(teacher "
        "|| student) at T = 1: lambda_consistency is found while training, from 1; `consistency` left out is `kl`.",
    )
    balance: Mapping[str, float] | None = setting(
        "numbers",
        None,
        keys=TERMS,
        minimum=0.0,
        exclusive=True,
        maximum=1000.0,
        help="Hold each named term's gradient at this share of the task's (norms, by the final hidden states), as "
        "share_interval measures it: the weight is found while training. A schedule multiplies it.",
    )
    teacher_interval: int = setting(
        "integer",
        1,
        minimum=1,
        help="Run the teacher on every n-th row, or micro-batch, with n times the weight: unbiased in expectation.",
    )
    teacher_pass: str = setting(
        "choice",
        "shared",
        choices=("shared", "by_layer", "whole"),
        help="`shared`: layers below the first adapted one are computed once, where that is exact; `whole`: twice; "
        "`by_layer`: `shared`, and each layer runs the teacher inside the student's call: FSDP gathers it once less.",
    )
    teacher_cache: str | os.PathLike[str] | None = setting(  # noqa: RUF009  (a field, which is no shared value)
        "path",
        None,
        only=Only("nlg", "it keeps next-token outputs; the teacher of a classifier runs live"),
        help="Directory that keeps the teacher's outputs for each document: computed once, before the first step, and "
        "read in every later epoch and run. Left out: the teacher runs live.",
    )
    teacher_cache_top_k: int | None = setting(
        "integer",
        None,
        minimum=0,
        help="What teacher_cache keeps of a token. 0: its final hidden state, exact. n: the teacher's n largest "
        "log-probabilities (6 n + 4 bytes); the consistency term is then taken over n + 1 buckets, a lower bound of "
        "the whole one. Left out: what the directory holds; in an empty one hidden states while those of the training "
        "data stay below 50 GB, else 128 log-probabilities.",
    )
    anchor_data: Any = setting(  # noqa: RUF009
        "data",
        None,
        only=Only("nlg", "the consistency of a classifier is that of the samples that it is trained on"),
        help="Text without labels on which the consistency term is taken too: a file (.jsonl with `text`, `messages` "
        "or `prompt`; .txt with an empty line between documents), or what `datasets` loads by name; in Python a "
        "datasets.Dataset too. Left out: none.",
    )
    anchor_fraction: float = setting(
        "number",
        0.1,
        minimum=0.0,
        maximum=1.0,
        only=Only("nlg", "there are no anchors", neutral=(0.0,)),
        help="Rows of anchor_data for each row of training data, over all steps; 0: none.",
    )
    gather_batch_statistics: bool = setting(
        "flag",
        False,
        only=Only("nlu", "only classification takes statistics over samples"),
        help="Covariance and spectrum over the samples of all data-parallel ranks together, not over each rank's own.",
    )
    head_warmup_steps: int = setting(
        "integer",
        0,
        minimum=0,
        only=Only("nlu", "there is no new head to warm up"),
        help="The first n optimizer steps train the classification head alone on the pre-trained features; the teacher "
        "then has that head, instead of the initial (usually random) one.",
    )
    share_interval: int = setting(
        "integer",
        100,
        minimum=0,
        help="Measure each term's share of the gradient every n optimizer steps (`balora/share_*`); 0: never.",
    )
    monitor: bool = setting(
        "flag",
        False,
        help="Evaluation also measures every term of weight 0, `drift` (KL from the model that training began with at "
        "T = 1, in nats a counted token or sample) and the predictions' `entropy`, for any method: curves of methods "
        "stand beside each other. Training is not changed.",
    )

    def __post_init__(self) -> None:
        for name, known in sorted(settings_of(self).items(), key=lambda item: item[1].kind != "choice"):
            setattr(self, name, known.checked(name, getattr(self, name)))  # names first: what they say may matter more
        if self.diversity_top_k == 1:
            raise ValueError("diversity_top_k=1 makes the entropy 0 by definition: write 0 (full vocabulary) or >= 2.")
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
        self._check_own_weights()

    def _check_own_weights(self) -> None:
        """Refuses settings that would move one weight in two ways, or a weight that is switched off."""
        sets = [key for key, asked in self._sets_consistency().items() if asked]
        if len(sets) > 1:
            raise ValueError(f"{' with '.join(sets)}: both set lambda_consistency: remove one of the two.")
        if self.drift_target is not None and self.lambda_consistency == 0:
            raise ValueError(
                f"drift_target={self.drift_target:g} with lambda_consistency=0, which switches its term off: leave "
                "lambda_consistency out."
            )
        for name, share in (self.balance or {}).items():
            if getattr(self, f"lambda_{name}") == 0:
                off = f"balance.{name}={share:g} with lambda_{name}=0, which switches its term off"
                raise ValueError(f"{off}: leave lambda_{name} out.")
        if self.balance and not self.share_interval:
            raise ValueError("balance with share_interval=0, which measures no shares: leave share_interval out.")

    def _sets_consistency(self) -> dict[str, bool]:
        """{a setting that finds lambda_consistency, as it was written: whether it is in use}."""
        return {
            f"drift_target={self.drift_target}": self.drift_target is not None,
            f"balance.consistency={(self.balance or {}).get('consistency')}": "consistency" in (self.balance or {}),
            "schedule='adaptive'": self.schedule == "adaptive",
        }

    def holds(self, term: str) -> str | None:
        """What a term's weight is found for, in words; None where it is written, or scheduled."""
        if term == "consistency" and self.drift_target is not None:
            return f"held at a drift of {self.drift_target:g}"
        share = (self.balance or {}).get(term)
        return None if share is None else f"held at {share:g} of the task's gradient"

    def resolved(self, task: str | None = None) -> RegularizerConfig:
        """Returns a copy with every None replaced by the preset's value for `task` ("nlg" or "nlu").

        `task` may be omitted if the config names one. A task here and another one in the config is a ValueError.
        """
        if task is None or task == "auto":
            task = self.task
        elif self.task not in ("auto", task):
            raise ValueError(f"task={self.task!r} in the config, but this trainer's model is for task={task!r}.")
        if task not in TASKS:
            raise ValueError(f"task={task!r}: say 'nlg' or 'nlu', here or in RegularizerConfig(task=...).")
        filled: dict[str, Any] = {}
        for name, known in settings_of(self).items():
            value = getattr(self, name)
            known.check_family(name, value, task)
            if value is None:
                filled[name] = known.preset_value(self.preset, task)
        if self.drift_target is not None:
            filled |= {name: SEARCHED[name] for name in SEARCHED.keys() & filled.keys()}
        whole = dataclasses.replace(self, task=task, **filled)
        whole._check_cache_at_one()
        return whole

    def _check_cache_at_one(self) -> None:
        """Refuses to ask a cache of log-probabilities at another temperature for what is measured at T = 1."""
        asks = "drift_target" if self.drift_target is not None else "schedule" if self.schedule == "adaptive" else None
        if asks is None or self.teacher_cache is None or self.teacher_cache_top_k == 0 or self.temperature == 1.0:
            return
        if form_named(self.consistency or "kl").buckets is not None:
            raise ValueError(
                f"{asks}={getattr(self, asks)!r} is measured at T = 1, and teacher_cache may keep log-probabilities at "
                f"temperature={self.temperature:g} alone: write teacher_cache_top_k=0, or temperature=1.0."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, None where the preset decides (JSON-ready); of data in memory what it is."""
        return dataclasses.asdict(dataclasses.replace(self, anchor_data=described(self.anchor_data)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RegularizerConfig:
        """Builds a config from plain values; an unknown key is a ValueError that names the nearest, or all of them."""
        unknown = sorted({str(key) for key in values} - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(_no_setting(unknown[0]))
        return cls(**values)


def as_regularizers(value: Any) -> RegularizerConfig:
    """`value` as a RegularizerConfig; a dict of its fields works too."""
    if isinstance(value, dict):
        return RegularizerConfig.from_dict(value)
    if not isinstance(value, RegularizerConfig):
        raise TypeError(f"regularizers={value!r} must be a RegularizerConfig or a dict of its fields.")
    return value
