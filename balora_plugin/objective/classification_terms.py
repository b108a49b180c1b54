"""The NLU terms of one micro-batch over N samples, built from the formulas; what cannot act is None, never NaN."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..fused.loss import PLAIN_TASK, TaskForm
from ..fused.spectrum import usable_k
from ..regularizers import consistency_rows, covariance, cross_entropy_rows, known_form, spectral, upcast

REGRESSION, SINGLE_LABEL, MULTI_LABEL = "regression", "single_label_classification", "multi_label_classification"


class BatchLabels(NamedTuple):
    """A batch's labels (N,) or (N, D), their kind of task, and which samples count (N,)."""

    values: Tensor
    problem: str
    counted: Tensor


def task_rows(logits: Tensor, labels: Tensor, problem: str, form: TaskForm) -> Tensor:
    """Each sample's task loss as transformers' classifiers take its mean: (N, D) logits -> (N, 1), of labels (N, D).

    Of a label of -100: 0. `form` is for classes alone.
    """
    if problem == SINGLE_LABEL:
        rows = cross_entropy_rows(logits, labels.reshape(len(logits)), label_smoothing=form.smoothing, dft=form.dft)
        return rows.unsqueeze(1)
    logits = upcast(logits)
    labels = labels.reshape(logits.shape).to(logits)
    if problem == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (logits - labels).square()


def check_form(form: TaskForm, problem: str) -> None:
    """Refuses a form of the task loss that has no meaning for a kind of task: it is one of the cross-entropy.

    Raises:
        ValueError: names the host's argument, its value, the kind of task and what to write.
    """
    if problem == SINGLE_LABEL or form == PLAIN_TASK:
        return
    said = "loss_type='dft'" if form.dft else f"label_smoothing_factor={form.smoothing!r}"
    remedy = "leave it at its default" if form.dft else "set it to 0"
    kind = "a regression" if problem == REGRESSION else "several labels a sample"
    raise ValueError(f"{said} is for one class a sample, and problem_type={problem!r} is {kind}: {remedy}.")


def consistency_of(student: Tensor, teacher: Tensor, *, problem: str, form: str, temperature: float) -> Tensor:
    """Distance of each sample's outputs from the teacher's: (N, D), (N, D) logits -> (N,) in float32 (float64).

    Classes: the form as it is. Several labels a sample: KL and JSD of each label's Bernoulli distribution, summed over
    labels. Regression, or a single output: the squared difference of the outputs, mean over D; a softmax or a
    normalised row of one number is a constant.
    """
    if problem == REGRESSION or student.shape[-1] == 1:
        return (upcast(student) - upcast(teacher.detach())).square().mean(dim=-1)
    if problem == MULTI_LABEL and known_form(form).uses_temperature:  # sigmoid(z) is the softmax of (z, 0)
        student, teacher = (torch.stack([z, torch.zeros_like(z)], dim=-1) for z in (student, teacher))
        return consistency_rows(student, teacher, form=form, temperature=temperature).sum(dim=-1)
    return consistency_rows(student, teacher, form=form, temperature=temperature)


def diversity_of(rows: Tensor) -> Tensor | None:
    """Off-diagonal covariance of (N, D) rows, 0-d; None for a single sample or a single column."""
    return None if min(rows.shape) < 2 else covariance(rows)


def spectrum_of_samples(rows: Tensor, *, k: int, norm: str, centered: bool) -> tuple[Tensor, int] | None:
    """Minus the leading singular values of (N, D) rows, and the k that was used; None where no k can act.

    k is at most one less than the number of singular values under the nuclear norm, where their whole sum would be a
    constant ratio of 1. A single sample or column has one singular value: nothing to tell signal from noise.
    """
    limit = min(rows.shape[0], rows.shape[1] - centered)  # centred rows have one direction less
    if limit < 2:
        return None
    used = min(usable_k(limit, k, norm), limit)
    return spectral(rows, k=used, norm=norm, centered=centered), used
