"""T^2 KL(student || teacher), the derivative T q (log q/p - KL). Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ._form import Form, Pool
from ._parts import divergence, log_softmaxes, log_softmaxes_in_place, times


def _dense(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, log_t = log_softmaxes(student, teacher, temperature)
    return temperature**2 * divergence(log_q, log_t)


def _in_place(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    log_q, log_t = log_softmaxes_in_place(z, z_t, temperature, pool)
    q = torch.exp(log_q, out=z_t)
    product = log_q.sub_(log_t).mul_(q)
    rows = product.sum(dim=-1, keepdim=True)
    return temperature**2 * rows, product.sub_(q.mul_(rows)).mul_(temperature) if differentiate else product


def _buckets(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    summands = times(log_q, log_q - log_t)
    return summands, summands


FORM = Form(_dense, _in_place, _buckets)
