"""One chunk of rows: loss sums and the gradient by the logits, written out and computed in place. Imports torch alone.

With p = softmax(z) and H its entropy, per row:
    task         d/dz = p - onehot
    -H           d/dz = p (log p + H); over the top K the same on the K renormalised probabilities
    consistency  kl: T (q - p_t), reverse_kl: T q (log q/p_t - KL), jsd: T/2 q (log q/m - KL(q || m)) with q, p_t at
                 temperature T; mse: the projection of the difference of the unit rows
At T = 1 the first three share p: three (rows, V) buffers in all. Fresh ones for every chunk would cost more time than
the passes over them.
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
    hits = first_argmax(z) == labels
    consistency, extra = z.new_zeros(()), None
    if z_t is not None and not joint:
        consistency, extra = _FORMS[form](z, z_t, temperature, pool, differentiate)
    if top:
        values, index = z.topk(top_k, dim=-1)
        top_log_p = torch.log_softmax(values, dim=-1)
        top_p = top_log_p.exp()
        top_entropy = -(top_p * top_log_p).sum(dim=-1, keepdim=True)
    log_p = _log_softmax(z, pool(2))
    task = -log_p.gather(1, target).sum()
    if joint and z_t is not None:
        log_t = _log_softmax(z_t, z)  # z is not needed any more
        torch.exp(log_t, out=z_t)
        # the difference first: a difference of two sums would lose what is left of a small divergence
        consistency = log_t.sub_(log_p).mul_(z_t).sum()
    p = torch.exp(log_p, out=z)
    p_log_p = log_p.mul_(p)
    entropy = -p_log_p.sum(dim=-1, keepdim=True)
    diversity = -(top_entropy.sum() if top else entropy.sum())
    sums = torch.stack([task, consistency, diversity, entropy.sum(), hits.sum().to(z.dtype)])
    if not differentiate:
        return sums
    share = a + b if joint else a
    if c and not top:
        p.mul_(entropy.mul_(c).add_(share)).add_(p_log_p, alpha=c)
    elif share != 1.0:
        p.mul_(share)
    if top and c:
        p.scatter_add_(1, index, c * top_p * (top_log_p + top_entropy))
    if joint and z_t is not None:
        p.add_(z_t, alpha=-b)
    elif extra is not None:
        p.add_(extra, alpha=b)
    if a:
        p.scatter_add_(1, target, torch.full_like(target, -a, dtype=z.dtype))
    return sums


def first_argmax(z: Tensor, block: int = 128) -> Tensor:
    """z.argmax(-1), (C, V) -> (C,), the first of equals too: by blocks, ten times faster on a CPU."""
    rows, vocabulary = z.shape
    blocks = vocabulary // block
    if blocks < 2 or z.device.type != "cpu":
        return z.argmax(dim=-1)
    head = z[:, : blocks * block].unflatten(1, (blocks, block))
    maxima = head.amax(dim=-1)
    best = maxima.argmax(dim=-1, keepdim=True)
    within = head.gather(1, best.unsqueeze(-1).expand(rows, 1, block)).squeeze(1)
    found = best.squeeze(1) * block + within.argmax(dim=-1)
    if blocks * block == vocabulary:
        return found
    tail, where = z[:, blocks * block :].max(dim=-1)
    return torch.where(tail > maxima.amax(dim=-1), where + blocks * block, found)


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
