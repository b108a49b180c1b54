"""Every key that a run logs: what it is, its unit and sign, and where it is healthy.

`python docs/logs.py` makes the table of docs/logs.md of this.
"""

from __future__ import annotations

from typing import NamedTuple

from ..config import TERMS

PREFIX = "balora/"
WHERE = {
    "train": "in the log of training, over the steps since the last one",
    "eval": "in an evaluation, over its whole data, as eval_balora/...",
    "both": "in both",
    "end": "once, in the log that ends training",
}


class LogKey(NamedTuple):
    """A key of the log. Texts are Markdown, as docs/logs.md has them.

    Attributes:
        meaning: What it is.
        unit: Of its value; "" for a plain number.
        sign: The values that it can have.
        healthy: The range of a run in which nothing is to be mended.
        where: Of WHERE.
        needs: The setting without which it is not logged; "" where it always is.
    """

    meaning: str
    unit: str
    sign: str
    healthy: str
    where: str = "both"
    needs: str = ""


_NOT_NEGATIVE, _NOT_POSITIVE, _POSITIVE = "≥ 0", "≤ 0", "> 0"
_OWN_WEIGHTS = "[`drift_target`, `balance` or `schedule: adaptive`](method.md#weights-that-set-themselves)"

LOG_KEYS = {
    "task": LogKey(
        "the task's loss, mean over counted tokens (classifiers: samples)",
        "nats",
        _NOT_NEGATIVE,
        "falls; a rise in evaluation alone is overfitting",
    ),
    "consistency": LogKey(
        "distance from the teacher in the form that is set, unweighted; by default KL(teacher ‖ student), times T² at "
        "a temperature T",
        "nats (`mse`: none)",
        _NOT_NEGATIVE,
        "0 at the first step, then grows and flattens",
        needs="`lambda_consistency`",
    ),
    "diversity": LogKey(
        "minus the entropy of the predictions, unweighted; of classifiers a covariance, ≥ 0",
        "nats",
        _NOT_POSITIVE,
        "about as before training",
        needs="`lambda_diversity`",
    ),
    "svd": LogKey(
        "minus the leading singular values' share of all, unweighted; by `svd_norm` it may go below -1",
        "",
        _NOT_POSITIVE,
        "-1 to 0, falls slowly",
        needs="`lambda_svd`",
    ),
    "loss": LogKey(
        "what is minimised: task plus each term times its weight",
        "nats",
        "any",
        "falls",
    ),
    **{
        f"share_{name}": LogKey(
            f"the {spoken} term's share{more}",
            "",
            _NOT_NEGATIVE,
            healthy,
            "train",
            needs=f"`lambda_{name}`; every `share_interval` steps",
        )
        for name, spoken, more, healthy in (
            ("consistency", "consistency", "; 0 while student and teacher agree", "0.01 to 1"),
            ("diversity", "diversity", "", "0.01 to 0.5"),
            ("svd", "singular-value", "", "0.01 to 0.5"),
        )
    },
    "svd_used_k": LogKey(
        "how many singular values counted as leading; less than what is set where classes or samples are few",
        "",
        "≥ 1",
        "`svd_top_k`",
        needs="a classifier with `lambda_svd`",
    ),
    **{
        f"lambda_{name}": LogKey(
            f"the weight of the {name} term in force",
            "",
            _NOT_NEGATIVE,
            "settles; at a bound the target cannot be met, and a line says so",
            "train",
            needs=_OWN_WEIGHTS,
        )
        for name in TERMS
    },
    "drift": LogKey(
        "KL(teacher ‖ student) at T = 1, whatever form the term has; of regression the squared difference",
        "nats",
        _NOT_NEGATIVE,
        "the `drift_target`, or less",
        needs="`drift_target`; in evaluation `monitor: true` too",
    ),
    "entropy": LogKey(
        "entropy of the student's predictions over the whole vocabulary, at T = 1",
        "nats",
        _NOT_NEGATIVE,
        "about as before training",
        "eval",
        needs="`monitor: true`",
    ),
    "anchor_consistency": LogKey(
        "the consistency term on [anchor texts](method.md#anchors), unweighted",
        "as `balora/consistency`",
        _NOT_NEGATIVE,
        "stays below `balora/consistency`",
        needs="`anchor_data`",
    ),
    "seconds_per_step": LogKey(
        "an optimizer step, evaluations and checkpoints aside",
        "seconds",
        _POSITIVE,
        "as without terms, times 1 + `overhead`",
        "end",
    ),
    "tokens_per_second": LogKey(
        "speed over all processes",
        "counted tokens a second",
        _POSITIVE,
        "as high as the machine allows; packing raises it",
        "end",
        needs="a language model",
    ),
    "samples_per_second": LogKey(
        "the same of classifiers",
        "samples a second",
        _POSITIVE,
        "as high as the machine allows",
        "end",
        needs="a classifier",
    ),
    "overhead": LogKey(
        "what the terms add to a step, by the parts measured in this run; 0.5 is half as long again",
        "of a step without terms",
        _NOT_NEGATIVE,
        "0.3 to 0.6 with a live teacher, less with `teacher_cache` or `teacher_interval`",
        "end",
        needs="`share_interval` above 0; not with `compile: true`",
    ),
    "peak_gib": LogKey(
        "the most memory of a step on this process: a GPU's tensors, on a CPU all that is resident",
        "GiB",
        _POSITIVE,
        "below what there is",
        "end",
    ),
}


def known_key(logged: str) -> LogKey | None:
    """Returns what is known of a key as a host logs it, `balora/task` or `eval_balora/task`; None for another's."""
    _, prefix, name = logged.rpartition(PREFIX)
    return LOG_KEYS.get(name) if prefix else None
