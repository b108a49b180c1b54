"""T^2 KL(teacher || student), the derivative T (q - p). Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ._form import Exponentials, Form, Pool
from ._parts import divergence, log_softmaxes, log_softmaxes_in_place, times


def _dense(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, log_t = log_softmaxes(student, teacher, temperature)
    return temperature**2 * divergence(log_t, log_q)


def _in_place(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    log_q, log_t = log_softmaxes_in_place(z, z_t, temperature, pool)
    p_t = torch.exp(log_t, out=z_t)
    value = temperature**2 * log_t.sub_(log_q).mul_(p_t).sum(dim=-1, keepdim=True)
    return value, log_q.exp_().sub_(p_t).mul_(temperature) if differentiate else log_q


def _buckets(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    return times(log_t, log_t - log_q), -log_t.exp()


def _joint(z: Tensor, z_t: Tensor, e: Exponentials, e_t: Exponentials) -> Tensor:
    # the difference first: a difference of two sums would lose what is left of a small divergence
    difference = z_t.sub_(z).mul_(e_t.values).sum(dim=-1, keepdim=True)
    return (difference * e_t.inverse).sub_(e_t.log_total).add_(e.log_total)


FORM = Form(_dense, _in_place, _buckets, _joint)
