"""Squared difference of the L2-normalised rows, mean over D; the derivative is a projection of it. Imports torch alone.

It compares logits: no temperature, and no top-K form.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._form import Form, Pool

EPS = 1e-6  # the least length that a row is divided by


def _dense(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return (F.normalize(student, dim=-1, eps=EPS) - F.normalize(teacher, dim=-1, eps=EPS)).square().mean(dim=-1)


def _in_place(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    length = norm.clamp_min(EPS)
    z_t.div_(torch.linalg.vector_norm(z_t, dim=-1, keepdim=True).clamp_min(EPS))
    unit = torch.div(z, length, out=pool(3))
    difference = torch.sub(unit, z_t, out=z_t)
    product = torch.mul(difference, difference, out=pool(2))
    vocabulary = z.shape[-1]
    value = product.sum(dim=-1, keepdim=True) / vocabulary
    if not differentiate:
        return value, unit
    along = torch.mul(unit, difference, out=product).sum(dim=-1, keepdim=True)
    along = torch.where(norm > EPS, along, 0.0)  # a clamped length is a constant
    return value, torch.sub(difference, unit.mul_(along), out=unit).mul_(2.0 / (vocabulary * length))


FORM = Form(_dense, _in_place, uses_temperature=False)
