"""The formulas of the three terms on dense logits: the slow, obvious reference. Imports torch alone.

Rows are samples (NLU: N x D) or counted tokens (NLG: M x V). Every function returns the term to *minimise*, a scalar
averaged over rows, in float32 (float64 for float64 inputs): KL from bfloat16 logits comes out negative. The `*_rows`
variants give one value a row; `balora_plugin.fused` builds on them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .consistency import all_forms
from .consistency._form import Form

FORMS = all_forms()  # of the consistency term, by name


def upcast(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(student: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, dft: bool = False) -> Tensor:
    """The task term, mean over the rows whose label is not -100.

    Args:
        student: (rows, D) logits, differentiable.
        labels: (rows,) the index of each row's target; -100 = not counted.
        label_smoothing: The part of each target that is spread evenly over all D: (1 - s) (-log p_label) plus s times
            the mean of -log p over D, as transformers' label_smoothing_factor.
        dft: Each row's term times its p_label, through which no gradient flows (dynamic fine-tuning, arXiv 2508.05629),
            as TRL's loss_type="dft". Not together with smoothing.

    Raises:
        ValueError: smoothing outside 0 to 1, or both.

    >>> z = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    >>> round(cross_entropy(z, torch.tensor([1, -100])).item(), 4)  # log 2
    0.6931
    >>> round(cross_entropy(z, torch.tensor([1, -100]), dft=True).item(), 4)
    0.3466
    """
    rows = cross_entropy_rows(student, labels, label_smoothing=label_smoothing, dft=dft)
    return rows.sum() / (labels != -100).sum().clamp(min=1)


def consistency(student: Tensor, teacher: Tensor, *, form: str = "kl", temperature: float = 1.0) -> Tensor:
    """Distance of the student's outputs from the pre-trained model's (CR; paper, section "consistency").

    Args:
        student: (rows, D) logits, differentiable.
        teacher: (rows, D) logits of the pre-trained model; no gradient flows into them.
        form: "kl" = T^2 KL(teacher || student), "reverse_kl" = T^2 KL(student || teacher), "jsd" = T^2 times the
            half / half Jensen-Shannon divergence, "mse" = squared difference of the L2-normalised rows, mean over D.
        temperature: T > 0; not used by "mse".

    >>> z = torch.tensor([[1.0, 0.0, -1.0]])
    >>> consistency(z, z).item()
    0.0
    """
    return _mean(consistency_rows(student, teacher, form=form, temperature=temperature))


def token_entropy(student: Tensor, *, top_k: int = 0) -> Tensor:
    """Minus the mean entropy of softmax(student) (DR for NLG): (rows, V) logits -> scalar, in nats.

    `top_k` > 0 takes the student's K most likely tokens, renormalised; 0 (or >= V) takes all.
    """
    return _mean(-entropy_rows(student, top_k=top_k))


def covariance(student: Tensor) -> Tensor:
    """(1/D) * sum of squared off-diagonal covariances (DR for NLU, the form of VICReg): (N, D) -> scalar.

    With N < 2 a covariance does not exist and D < 2 has no off-diagonal: ValueError rather than nan or a silent 0.
    """
    z = upcast(student)
    n, d = z.shape
    if n < 2 or d < 2:
        raise ValueError(f"covariance needs at least 2 samples and 2 columns, got {n} x {d}.")
    z = z - z.mean(dim=0)
    cov = z.T @ z / (n - 1)
    return (cov - torch.diag(cov.diagonal())).square().sum() / d  # a difference of sums would cancel


def spectral(student: Tensor, *, k: int, norm: str = "nuclear", centered: bool = False) -> Tensor:
    """Minus the share of the k largest singular values (SVDR): (rows, D) -> scalar.

    Args:
        student: (rows, D) logits or features.
        k: How many singular values count as signal. With k >= min(rows, D) the ratio is constant and trains nothing;
            callers clamp k and say so.
        norm: "nuclear" = sum_k / sum of all, "frobenius" = sum_k / ||Z||_F, "none" = sum_k.
        centered: Subtract each row's mean first, which no probability sees.

    Rows that are not finite give NaN, as they do in the other terms.
    """
    z = upcast(student)
    if centered:
        z = z - z.mean(dim=-1, keepdim=True)
    some, finite = torch.stack([z.any(), z.isfinite().all()]).tolist()
    if not some:  # no rows, or all zero: 0 with a gradient of 0, not 0 / 0
        return z.sum() * 0.0
    if not finite:  # an SVD raises without a word on what it was given
        return z.sum() * torch.nan
    return -singular_value_ratio(torch.linalg.svdvals(z), k, norm)


def singular_value_ratio(s: Tensor, k: int, norm: str) -> Tensor:
    """Ratio of the first k of the descending singular values `s` (n,) to their norm; see [`spectral`]."""
    top = s[:k].sum()
    if norm == "nuclear":
        return top / s.sum()
    if norm == "frobenius":
        return top / torch.linalg.vector_norm(s)
    if norm == "none":
        return top
    raise ValueError(f"norm={norm!r} is not known: write 'nuclear', 'frobenius' or 'none'.")


def consistency_rows(student: Tensor, teacher: Tensor, *, form: str = "kl", temperature: float = 1.0) -> Tensor:
    """[`consistency`] per row: (rows, D), (rows, D) -> (rows,)."""
    return known_form(form).dense(upcast(student), upcast(teacher.detach()), temperature)


def cross_entropy_rows(student: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, dft: bool = False) -> Tensor:
    """[`cross_entropy`] per row: (rows, D), (rows,) -> (rows,), 0 where the label is -100."""
    check_task_form(label_smoothing, dft)
    rows = F.cross_entropy(upcast(student), labels, reduction="none", label_smoothing=label_smoothing)
    return rows * torch.exp(-rows.detach()) if dft else rows


def check_task_form(label_smoothing: float, dft: bool) -> None:
    """Refuses a form of the task term that there is not.

    Raises:
        ValueError: names what was given and what to write.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing!r} is a part of the target: write a number from 0 to 1.")
    if dft and label_smoothing:
        raise ValueError(
            f"label_smoothing={label_smoothing!r} beside dft: the probability of a target that is smoothed is not "
            "defined: set one of the two to 0."
        )


def known_form(form: str) -> Form:
    """The form of that name; ValueError, with all names, where there is none."""
    if form not in FORMS:
        *others, last = map(repr, FORMS)
        raise ValueError(f"form={form!r} is not known: write {', '.join(others)} or {last}.")
    return FORMS[form]


def entropy_rows(student: Tensor, *, top_k: int = 0) -> Tensor:
    """Entropy of each row's softmax in nats: (rows, V) -> (rows,)."""
    z = upcast(student)
    if 0 < top_k < z.shape[-1]:
        z = z.topk(top_k, dim=-1).values
    log_p = F.log_softmax(z, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def _mean(rows: Tensor) -> Tensor:
    # no counted row: 0 with a gradient of 0, not nan
    return rows.mean() if rows.numel() else rows.sum()
