"""One chunk of rows: loss sums and the gradient by the logits, written out and computed in place. Imports torch alone.

With p = softmax(z) and H its entropy, per row:
    task         d/dz = p - onehot
    -H           d/dz = p (log p + H); over the top K the same on the K renormalised probabilities
    consistency  kl: T (q - p_t), reverse_kl: T q (log q/p_t - KL), jsd: T/2 q (log q/m - KL(q || m)) with q, p_t at
                 temperature T; mse: the projection of the difference of the unit rows
At T = 1 the first three share p = exp(z - max) / total, which is never formed: its factors go into those of the rows.
Passes and memory are what counts beside the products: everything is in place, in few buffers that are used again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOG_HALF = math.log(0.5)
UNIT_EPS = 1e-6  # of the unit rows, as in regularizers.consistency_rows


class Weights(NamedTuple):
    """Factors of the task loss, the consistency term and minus the entropy in the loss."""

    task: float
    consistency: float
    diversity: float


Pool = Callable[[int], Tensor]


def token_chunk(
    z: Tensor,
    z_t: Tensor | None,
    labels: Tensor,
    weights: Weights,
    *,
    form: str,
    temperature: float,
    top_k: int,
    differentiate: bool,
    pool: Pool,
) -> Tensor:
    """Turns z into the gradient of the weighted loss by z (if `differentiate`) and returns sums over the rows.

    Args:
        z, z_t: (C, V) logits of student and teacher (or None), float32 or float64; both are overwritten.
        labels: (C,) targets.
        pool: pool(i), i from 2 on, gives (C, V) scratch buffers.

    Returns: (5,) sums of task, consistency, -H over top_k, H over all, top-1 hits.
    """
    a, b, c = weights
    top = 0 < top_k < z.shape[-1]
    joint = z_t is not None and form == "kl" and temperature == 1.0
    target = labels.unsqueeze(1)
    consistency, extra = z.new_zeros(()), None
    if z_t is not None and not joint:
        consistency, extra = _FORMS[form](z, z_t, temperature, pool, differentiate)
    if top:
        values, index = z.topk(top_k, dim=-1)
        top_log_p = torch.log_softmax(values, dim=-1)
        top_p = top_log_p.exp()
        top_entropy = -(top_p * top_log_p).sum(dim=-1, keepdim=True)
    z.sub_(z.amax(dim=-1, keepdim=True))
    e, total, log_total = _exponentials(z, pool(2))  # p = e / total, log p = z - log_total
    chosen = z.gather(1, target)
    task = (log_total - chosen).sum()
    hits = count_hits(z, labels, chosen)
    if joint and z_t is not None:
        z_t.sub_(z_t.amax(dim=-1, keepdim=True))
        e_t, total_t, log_total_t = _exponentials(z_t, pool(3))
        # the difference first: a difference of two sums would lose what is left of a small divergence
        difference = z_t.sub_(z).mul_(e_t).sum(dim=-1, keepdim=True)
        consistency = (difference / total_t - (log_total_t - log_total)).sum()
    product = z.mul_(e)
    entropy = log_total - product.sum(dim=-1, keepdim=True) / total
    diversity = -(top_entropy.sum() if top else entropy.sum())
    sums = torch.stack([task, consistency, diversity, entropy.sum(), hits])
    if not differentiate:
        return sums
    share = a + b if joint else a
    if c and not top:  # p (share + c (log p + H))
        product.mul_(c / total).addcmul_(e, (share + c * (entropy - log_total)) / total)
    else:
        torch.mul(e, share / total, out=product)
    if top and c:
        product.scatter_add_(1, index, c * top_p * (top_log_p + top_entropy))
    if joint:
        product.addcmul_(e_t, -b / total_t)
    elif extra is not None:
        product.add_(extra, alpha=b)
    if a:
        product.scatter_(1, target, -a, reduce="add")
    return sums


def _exponentials(z: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z) in `out`, its sums over a row and their logarithms, (C, 1); the rows of z peak at 0."""
    e = torch.exp(z, out=out)
    total = e.sum(dim=-1, keepdim=True)
    return e, total, total.log()


def count_hits(z: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """How often z.argmax(-1) is the label: z (C, V) with its peaks at 0, labels (C,), chosen (C, 1) = z at the labels.

    The first of equal peaks counts, as in argmax, which costs a CPU ten times the rest of this: it is asked only where
    the label stands at the peak and is not alone there.
    """
    at_peak = chosen == 0
    if z.device.type != "cpu" or torch.compiler.is_compiling():
        return (at_peak.squeeze(1) & (z.argmax(dim=-1) == labels)).sum().to(z.dtype)
    rows = at_peak.nonzero()[:, 0]
    if not rows.numel():
        return z.new_zeros(())
    candidates = z[rows]
    tied = candidates.count_nonzero(dim=-1) < z.shape[-1] - 1
    lost = (candidates[tied].argmax(dim=-1) != labels[rows[tied]]).sum() if bool(tied.any()) else 0
    return z.new_tensor(rows.numel()) - lost


def _log_softmax(x: Tensor, out: Tensor) -> Tensor:
    return torch.log_softmax(x, dim=-1, out=out)


def _tempered(z: Tensor, z_t: Tensor, temperature: float, pool: Pool) -> tuple[Tensor, Tensor]:
    """log softmax(z / T) in pool(3) and log softmax(z_t / T) in pool(2); z_t is scratch afterwards."""
    log_q = _log_softmax(torch.div(z, temperature, out=pool(2)), pool(3))
    return log_q, _log_softmax(z_t.div_(temperature), pool(2))


def _kl(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    log_q, log_t = _tempered(z, z_t, temperature, pool)
    p_t = torch.exp(log_t, out=z_t)
    value = temperature**2 * log_t.sub_(log_q).mul_(p_t).sum()
    return value, log_q.exp_().sub_(p_t).mul_(temperature) if differentiate else log_q


def _reverse_kl(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    log_q, log_t = _tempered(z, z_t, temperature, pool)
    q = torch.exp(log_q, out=z_t)
    product = log_q.sub_(log_t).mul_(q)
    rows = product.sum(dim=-1, keepdim=True)
    return temperature**2 * rows.sum(), product.sub_(q.mul_(rows)).mul_(temperature) if differentiate else product


def _jsd(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    log_q, log_t = _tempered(z, z_t, temperature, pool)
    log_m = torch.logaddexp(log_q, log_t, out=z_t).add_(LOG_HALF)
    p = torch.exp(log_t, out=pool(4))
    teacher = log_t.sub_(log_m).mul_(p).sum()
    q = torch.exp(log_q, out=p)
    product = log_q.sub_(log_m).mul_(q)
    rows = product.sum(dim=-1, keepdim=True)
    value = 0.5 * temperature**2 * (teacher + rows.sum())
    return value, product.sub_(q.mul_(rows)).mul_(0.5 * temperature) if differentiate else product


def _mse(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    length = norm.clamp_min(UNIT_EPS)
    z_t.div_(torch.linalg.vector_norm(z_t, dim=-1, keepdim=True).clamp_min(UNIT_EPS))
    unit = torch.div(z, length, out=pool(3))
    difference = torch.sub(unit, z_t, out=z_t)
    product = torch.mul(difference, difference, out=pool(2))
    vocabulary = z.shape[-1]
    value = product.sum() / vocabulary
    if not differentiate:
        return value, unit
    along = torch.mul(unit, difference, out=product).sum(dim=-1, keepdim=True)
    along = torch.where(norm > UNIT_EPS, along, 0.0)  # a clamped length is a constant
    return value, torch.sub(difference, unit.mul_(along), out=unit).mul_(2.0 / (vocabulary * length))


_FORMS = {"kl": _kl, "reverse_kl": _reverse_kl, "jsd": _jsd, "mse": _mse}
FORMS = tuple(_FORMS)
