"""What a consistency form is. Imports torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

Pool = Callable[[int], Tensor]  # pool(i), i from 2 on: a scratch buffer (C, V), the same for the same i


class Exponentials(NamedTuple):
    """exp(z) (C, V) of some logits, one over its sum over each row, and that sum's logarithm in the logits' units."""

    values: Tensor
    inverse: Tensor  # (C, 1)
    log_total: Tensor  # (C, 1)


class Form(NamedTuple):
    """A distance of the student's outputs from the teacher's, row by row; log q and log p are theirs at temperature T.

    Attributes:
        dense: dense(student, teacher, temperature), logits (rows, D), float32 or float64 -> (rows,). The reference:
            obvious, and differentiated by autograd.
        in_place: in_place(z, z_t, temperature, pool, differentiate), logits (C, V) -> each row's value (C, 1), and its
            derivative by z (C, V) in a buffer of `pool` or in z_t (anything without `differentiate`). z is left as it
            is, z_t is scratch. pool(2), pool(3) and pool(4) may be used.
        buckets: buckets(log_q, log_t), log-probabilities of K + 1 buckets (C, K + 1), -inf where there is nothing ->
            summands of each row's divergence and its derivative by log q, up to a multiple of q, (C, K + 1) each;
            without the T^2. None for a form that needs all logits.
        joint: joint(z, z_t, e, e_t) -> value (C, 1) at T = 1 from exponentials that the task loss takes as well, in the
            logits' units; only for a form whose derivative by z is q - p there. z is left as it is, z_t is scratch.
        uses_temperature: It compares softmax(logits / T); False: what the logits are themselves.
    """

    dense: Callable[[Tensor, Tensor, float], Tensor]
    in_place: Callable[[Tensor, Tensor, float, Pool, bool], tuple[Tensor, Tensor]]
    buckets: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    joint: Callable[[Tensor, Tensor, Exponentials, Exponentials], Tensor] | None = None
    uses_temperature: bool = True
