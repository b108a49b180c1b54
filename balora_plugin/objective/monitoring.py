"""What an evaluation measures beside the loss, in units that are the same for every method: drift and entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..fused.loss import TermForm, TokenLoss
from ..regularizers import upcast
from .causal_lm_terms import token_sums
from .classification_terms import MULTI_LABEL, REGRESSION, consistency_of
from .request import StepRequest

DRIFT = TermForm("kl", 1.0, 0)  # from the teacher to the student, in nats


def monitored_tokens(
    request: StepRequest, sums: Sequence[Tensor], hidden: Tensor, targets: Tensor, asked: TokenLoss
) -> dict[str, Tensor]:
    """The drift of a micro-batch of tokens, and its loss by the weights that are in force, not those of `asked`.

    sums: those of `token_sums` by `asked`; hidden (B, T, d), targets (B, T) aligned.
    """
    _, task, consistency, diversity, *_ = sums
    lambdas = request.lambdas
    loss = task + lambdas.consistency * consistency + lambdas.diversity * diversity
    if (asked.form.consistency, asked.form.temperature) == (DRIFT.consistency, DRIFT.temperature):
        return {"loss": loss, "drift": consistency}
    weights = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    drift = token_sums(hidden, targets, asked._replace(form=DRIFT, weights=weights))[2]
    return {"loss": loss, "drift": drift}


def monitored_samples(logits: Tensor, teacher: Tensor | None, counted: Tensor, problem: str) -> dict[str, Tensor]:
    """Drift and entropy of a classifier's samples, summed: logits (N, D) of student and teacher, counted (N,).

    Nothing without the teacher's. Several labels a sample: of each label's Bernoulli distribution, summed over labels.
    Scores: the drift is the squared difference, and there is no entropy.
    """
    if teacher is None:
        return {}
    drift = consistency_of(logits, teacher, problem=problem, form=DRIFT.consistency, temperature=DRIFT.temperature)
    found = {"drift": torch.where(counted, drift, 0.0).sum()}
    if problem != REGRESSION and logits.shape[-1] > 1:
        wide = upcast(logits)
        wide = torch.stack([wide, torch.zeros_like(wide)], dim=-1) if problem == MULTI_LABEL else wide
        rows = -(wide.softmax(-1) * F.log_softmax(wide, -1)).sum(-1).reshape(len(logits), -1).sum(-1)
        found["entropy"] = torch.where(counted, rows, 0.0).sum()
    return found
