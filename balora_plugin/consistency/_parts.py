"""What several forms are made of. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._form import Pool


def log_softmaxes(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log q, log p: (rows, D) each."""
    # log_softmax, not softmax().log(): the latter is -inf at a logit gap of 120 in float32
    return F.log_softmax(student / temperature, dim=-1), F.log_softmax(teacher / temperature, dim=-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row: (rows, D), (rows, D) -> (rows,)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def log_softmaxes_in_place(z: Tensor, z_t: Tensor, temperature: float, pool: Pool) -> tuple[Tensor, Tensor]:
    """log q in pool(3) and log p in pool(2); z_t is scratch afterwards."""
    log_q = torch.log_softmax(torch.div(z, temperature, out=pool(2)), dim=-1, out=pool(3))
    return log_q, torch.log_softmax(z_t.div_(temperature), dim=-1, out=pool(2))


def times(log_p: Tensor, difference: Tensor) -> Tensor:
    """p times a difference of logarithms; nothing where p is."""
    p = log_p.exp()
    return torch.where(p > 0, p * difference, 0.0)
