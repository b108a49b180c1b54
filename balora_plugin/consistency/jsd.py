"""T^2 times the half / half Jensen-Shannon divergence, m = (q + p) / 2; the derivative T/2 q (log q/m - KL(q || m)).

Imports torch alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._form import Form, Pool
from ._parts import divergence, log_softmaxes, log_softmaxes_in_place, times

LOG_HALF = math.log(0.5)


def _dense(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, log_t = log_softmaxes(student, teacher, temperature)
    half = torch.log(torch.tensor(0.5, dtype=log_q.dtype, device=log_q.device))
    log_m = torch.logaddexp(log_q, log_t) + half
    return temperature**2 * (0.5 * (divergence(log_t, log_m) + divergence(log_q, log_m)))


def _in_place(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    log_q, log_t = log_softmaxes_in_place(z, z_t, temperature, pool)
    log_m = torch.logaddexp(log_q, log_t, out=z_t).add_(LOG_HALF)
    p = torch.exp(log_t, out=pool(4))
    teacher = log_t.sub_(log_m).mul_(p).sum(dim=-1, keepdim=True)
    q = torch.exp(log_q, out=p)
    product = log_q.sub_(log_m).mul_(q)
    rows = product.sum(dim=-1, keepdim=True)
    value = 0.5 * temperature**2 * (teacher + rows)
    return value, product.sub_(q.mul_(rows)).mul_(0.5 * temperature) if differentiate else product


def _buckets(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_q, log_t) + LOG_HALF
    ours = 0.5 * times(log_q, log_q - log_m)
    return 0.5 * times(log_t, log_t - log_m) + ours, ours


FORM = Form(_dense, _in_place, _buckets)
