"""What a micro-batch measures beside its terms, for weights that set themselves and for `monitor`: at T = 1 always."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..consistency._parts import times
from ..fused.head import Head
from ..fused.loss import IGNORED, TermForm, TokenLoss, TopLogProbs
from ..regularizers import entropy_rows
from .causal_lm_terms import token_sums
from .classification_terms import MULTI_LABEL, REGRESSION, BatchLabels, consistency_of
from .request import Measures
from .some_rows import of_rows

AT_ONE = TermForm("kl", 1.0)


@torch.no_grad()
def of_tokens(
    measures: Measures, hidden: Tensor, targets: Tensor, loss: TokenLoss, consistency: Tensor
) -> dict[str, Tensor]:
    """Sums over counted tokens, 0-d: hidden (B, T, d), targets (B, T) as in `token_sums`, and its consistency term.

    Over those that the teacher is met at. Of a cache of log-probabilities both are those of its K + 1 buckets: lower
    bounds.
    """
    found: dict[str, Tensor] = {}
    form, teacher = loss.form, loss.teacher
    none = torch.zeros_like(loss.weights)
    if measures.drift and (form.consistency, form.temperature) == (AT_ONE.consistency, AT_ONE.temperature):
        found["drift"] = consistency
    elif measures.drift:
        found["drift"] = token_sums(hidden, targets, loss._replace(form=AT_ONE, weights=none, task_rows=None))[2]
    if not measures.entropy or teacher is None:
        return found
    own = loss.head
    if loss.met is not None:
        targets = of_rows(targets, loss.met.met)
    if isinstance(teacher, TopLogProbs):
        entropy = _entropy_of_buckets(teacher)[targets.to(teacher.log_tail.device) != IGNORED].sum()
    else:
        given = teacher.head
        head = own if given is None else Head(given.weight, given.bias, own.scale, own.softcap)
        alone = loss._replace(head=head, teacher=None, form=AT_ONE, weights=none, task_rows=None, met=None)
        entropy = token_sums(teacher.hidden, targets, alone)[4]
    found["teacher_entropy"] = entropy.to(own.weight.device) / math.log(own.weight.shape[0])
    return found


def _entropy_of_buckets(top: TopLogProbs) -> Tensor:
    """(..., K), (...) -> (...): the entropy of K + 1 masses, divided by their sum."""
    log_p = torch.cat([top.log_probs.float(), top.log_tail.float().unsqueeze(-1)], dim=-1).log_softmax(dim=-1)
    return -times(log_p, log_p).sum(dim=-1)


@torch.no_grad()
def of_samples(measures: Measures, logits: Tensor, teacher: Tensor | None, labels: BatchLabels) -> dict[str, Tensor]:
    """Sums over counted samples, 0-d: logits (N, D) of both; nothing without a teacher.

    Several labels a sample: summed over them. A regression has no classes: its drift is the squared difference of the
    outputs, and it has no entropy (refused before).
    """
    found: dict[str, Tensor] = {}
    if teacher is None:
        return found
    if measures.drift:
        rows = consistency_of(logits, teacher, problem=labels.problem, form="kl", temperature=1.0)
        found["drift"] = torch.where(labels.counted, rows, 0.0).sum()
    if measures.entropy:
        rows = _entropies(teacher, labels.problem).mean(dim=-1) / math.log(_classes(teacher, labels.problem))
        found["teacher_entropy"] = torch.where(labels.counted, rows, 0.0).sum()
    if measures.student_entropy and labels.problem != REGRESSION and logits.shape[-1] > 1:
        rows = _entropies(logits, labels.problem).sum(dim=-1)
        found["entropy"] = torch.where(labels.counted, rows, 0.0).sum()
    return found


def _classes(logits: Tensor, problem: str) -> int:
    """Of how many classes each distribution of a sample is."""
    return 2 if problem == MULTI_LABEL else logits.shape[-1]


def _entropies(logits: Tensor, problem: str) -> Tensor:
    """(N, D) -> (N, D) of the labels' Bernoulli distributions, where a sample has several; else (N, 1)."""
    if problem == MULTI_LABEL:
        return entropy_rows(torch.stack([torch.zeros_like(logits), logits], dim=-1))
    return entropy_rows(logits).unsqueeze(-1)
