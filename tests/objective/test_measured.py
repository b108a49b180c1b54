"""Drift and the teacher's entropy against dense logits, whatever form and temperature the terms have."""

from __future__ import annotations

import math

import pytest
import torch

from balora_plugin.consistency import NAMES
from balora_plugin.fused import top_log_probs
from balora_plugin.fused.head import Head
from balora_plugin.fused.loss import TeacherStates, TermForm, TokenLoss
from balora_plugin.objective.causal_lm_terms import token_sums
from balora_plugin.objective.classification_terms import BatchLabels
from balora_plugin.objective.measured import of_samples, of_tokens
from balora_plugin.objective.request import Measures
from balora_plugin.regularizers import consistency_rows, entropy_rows

BOTH = Measures(drift=True, entropy=True)
ROWS, LENGTH, SIZE, VOCABULARY = 2, 5, 6, 17


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def tokens():
    """(student, teacher, head, the teacher's head, targets)."""
    targets = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    targets[0, :2] = -100
    student, teacher = (random(ROWS, LENGTH, SIZE, seed=seed) for seed in (1, 2))
    weight, own = (random(VOCABULARY, SIZE, seed=seed) for seed in (3, 4))
    return student, teacher, Head(weight, None, 0.5, 8.0), Head(own), targets


def dense(hidden, head, of, targets):
    """Logits (M, V) of the counted tokens; scale and cap are those of `of`."""
    logits = (hidden @ head.weight.T) * of.scale
    return (of.softcap * torch.tanh(logits / of.softcap))[targets != -100]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("own_head", [False, True])
def test_tokens_are_measured_at_one_whatever_the_form(form, temperature, own_head, tokens):
    student, teacher, head, other, targets = tokens
    states = TeacherStates(teacher, other if own_head else None)
    weights = torch.tensor([1.0, 0.7, 0.1], dtype=torch.float64)
    loss = TokenLoss(head, states, TermForm(form, temperature), weights, task_rows=torch.ones(ROWS, LENGTH))
    found = of_tokens(BOTH, student, targets, loss, token_sums(student, targets, loss)[2])
    z = dense(student, head, head, targets)
    z_t = dense(teacher, other if own_head else head, head, targets)
    torch.testing.assert_close(found["drift"], consistency_rows(z, z_t).sum())
    torch.testing.assert_close(found["teacher_entropy"], entropy_rows(z_t).sum() / math.log(VOCABULARY))


@pytest.mark.parametrize("k", [3, VOCABULARY])
def test_a_cache_of_log_probabilities_gives_those_of_its_buckets(k, tokens):
    student, teacher, head, _, targets = tokens
    head = Head(head.weight)
    z, z_t = ((x @ head.weight.T).flatten(0, 1) for x in (student, teacher))
    top = top_log_probs(teacher.flatten(0, 1), head.weight, k=k)
    kept = type(top)(*(x.unflatten(0, (ROWS, LENGTH)) for x in top))
    loss = TokenLoss(head, kept, TermForm("reverse_kl", 1.0), torch.ones(3, dtype=torch.float64))
    found = of_tokens(BOTH, student, targets, loss, torch.zeros(()))
    counted = (targets != -100).flatten()
    p, q = z_t.softmax(-1)[counted], z.softmax(-1)[counted]
    ids = top.ids.long()[counted]
    p, q = (torch.cat([x.gather(1, ids), (1 - x.gather(1, ids).sum(1, True)).clamp(min=0)], dim=1) for x in (p, q))
    drift = torch.where(p > 1e-12, p * (p / q).log(), 0.0).sum()
    entropy = -torch.where(p > 1e-12, p * p.log(), 0.0).sum() / math.log(VOCABULARY)
    torch.testing.assert_close(found["drift"].double(), drift, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["teacher_entropy"].double(), entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_samples(problem):
    logits, teacher = random(4, 3, seed=1), random(4, 3, seed=2)
    counted = torch.tensor([True, False, True, True])
    found = of_samples(BOTH, logits, teacher, BatchLabels(torch.zeros(4), problem, counted))
    if problem.startswith("single"):
        drift, entropy = consistency_rows(logits, teacher), entropy_rows(teacher) / math.log(3)
    else:  # each label's own Bernoulli distribution
        p, q = teacher.sigmoid(), logits.sigmoid()
        drift = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)
        entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean(1) / math.log(2)
    torch.testing.assert_close(found["drift"], drift[counted].sum())
    torch.testing.assert_close(found["teacher_entropy"], entropy[counted].sum())


def test_a_regression_drifts_by_its_squared_difference():
    logits, teacher = random(4, 1, seed=1), random(4, 1, seed=2)
    labels = BatchLabels(torch.zeros(4), "regression", torch.ones(4, dtype=torch.bool))
    found = of_samples(Measures(drift=True), logits, teacher, labels)
    torch.testing.assert_close(found["drift"], (logits - teacher).square().sum())


def test_nothing_is_measured_without_a_teacher():
    labels = BatchLabels(torch.zeros(4), "regression", torch.ones(4, dtype=torch.bool))
    assert of_samples(BOTH, random(4, 1, seed=1), None, labels) == {}
