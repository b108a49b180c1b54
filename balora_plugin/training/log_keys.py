"""Every key that a run logs: its unit, what it says, and where it is healthy. docs/logs.md is made of this."""

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
    """A key of the log.

    Attributes:
        unit: Of its value; "" for a plain number.
        meaning: What it is, and what a sign or a rise says.
        healthy: The range of a run in which nothing is to be mended, and what to do outside.
        where: Of WHERE.
        needs: The setting without which it is not logged; "" where it always is.
    """

    unit: str
    meaning: str
    healthy: str
    where: str = "both"
    needs: str = ""


_NATS = "nats a counted token (a classifier's: a sample)"
_SHARE = "of the task's gradient norm"

LOG_KEYS = {
    "task": LogKey(
        _NATS,
        "the task loss, mean over all counted tokens; >= 0, lower is better. (The host's own `loss` has the terms in "
        "it, and its `eval_loss` is a mean of batches.)",
        "falls; a rise in evaluation while it falls in training is overfitting",
    ),
    "consistency": LogKey(
        "nats times T² (with mse squared differences of normalised logits)",
        "distance of student and teacher by the chosen form, unweighted; >= 0, 0 before the first step",
        "rises from 0 and flattens; higher than you like: raise lambda_consistency, or set drift_target",
        needs="lambda_consistency, or monitor",
    ),
    "diversity": LogKey(
        "nats a counted token (of classifiers squared covariances)",
        "the diversity term, unweighted; of language models minus an entropy, so <= 0, of classifiers >= 0",
        "any; towards 0 means that predictions narrow to one token",
        needs="lambda_diversity, or monitor",
    ),
    "svd": LogKey(
        "minus a share, -1 to 0 (svd_norm: none: minus a sum of singular values)",
        "the singular-value term, unweighted; <= 0, and lower where the k largest singular values take more of the sum",
        "falls slowly; at a constant the term cannot act: a warning says why",
        needs="lambda_svd, or monitor",
    ),
    "svd_used_k": LogKey(
        "singular values",
        "how many of a classifier's count as signal, at most svd_top_k; a mean over micro-batches",
        "svd_top_k; less where a micro-batch's matrix is smaller",
        needs="a classifier with lambda_svd, or monitor",
    ),
    "loss": LogKey(
        _NATS,
        "what is minimised: the task loss plus all weighted terms, mean over all counted tokens",
        "falls; above `task` by what the terms weigh",
    ),
    "drift": LogKey(
        _NATS,
        "KL from the pre-trained model's predictions at temperature 1, whatever form the term has (with "
        "kl at temperature 1 they are one); of regression the squared difference; >= 0",
        "0.05 to 0.5 on the task's own data; far above, a smaller learning rate or a larger lambda_consistency",
        needs="drift_target, or monitor (then in evaluation alone)",
    ),
    "entropy": LogKey(
        _NATS,
        "entropy of the student's predictions at temperature 1; >= 0",
        "falls as the task is learnt; near 0 it is sure of everything, right or wrong",
        "eval",
        needs="monitor",
    ),
    "anchor_consistency": LogKey(
        "as consistency",
        "the consistency over the tokens of anchor_data, unweighted; >= 0",
        "below `consistency`, or the model forgets more off the task than on it",
        needs="anchor_data",
    ),
    **{
        f"share_{name}": LogKey(
            _SHARE,
            f"the gradient norm of the weighted {name} term over the task's, by the final hidden states; >= 0",
            "0.01 to 1; below 0.001 it hardly acts and a warning names the weight that would carry 1 %, above 1 it "
            "outweighs the task",
            "train",
            needs=f"lambda_{name}, at the steps of share_interval",
        )
        for name in TERMS
    },
    **{
        f"lambda_{name}": LogKey(
            "",
            f"the weight of the {name} term in force; >= 0",
            "settles; at a bound the target cannot be met, and a line says so",
            "train",
            needs="drift_target, balance or schedule: adaptive",
        )
        for name in TERMS
    },
    "seconds_per_step": LogKey(
        "seconds",
        "of an optimizer step of this process, evaluations and checkpoints aside",
        "as without terms, times 1 + overhead",
        "end",
    ),
    "tokens_per_second": LogKey(
        "counted tokens a second",
        "of all processes, padding and prompts that do not count aside",
        "as high as the machine allows; packing raises it",
        "end",
        needs="a language model",
    ),
    "samples_per_second": LogKey(
        "samples a second",
        "of all processes",
        "as high as the machine allows",
        "end",
        needs="a classifier",
    ),
    "overhead": LogKey(
        "of a step without terms",
        "what the terms add to a step, by the parts of this run: teacher, terms, spectrum, measuring of shares; 0.5 is "
        "half as long again",
        "0.3 to 0.6 with a live teacher, less with teacher_cache or teacher_interval",
        "end",
        needs="share_interval (not with compile: true, where terms are part of a graph)",
    ),
    "peak_gib": LogKey(
        "GiB",
        "the largest memory of one step on this process: tensors on a GPU, resident memory on a CPU",
        "below what there is; ba_lora_cost.json has it by part",
        "end",
    ),
}


def known_key(logged: str) -> LogKey | None:
    """Returns what is known of a key as a host logs it, `balora/task` or `eval_balora/task`; None for another's."""
    _, prefix, name = logged.rpartition(PREFIX)
    return LOG_KEYS.get(name) if prefix else None
