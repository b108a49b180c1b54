"""The consistency term from the teacher's K most likely tokens and the mass of all others. Imports torch alone.

Both models' distributions are taken over K + 1 buckets: the teacher's K most likely tokens, and the rest of the
vocabulary as one (docs/method.md). With u_b the derivative of a divergence by log q_b, up to a multiple of q_b, which
the normalisation takes away, and U the sum of all u_b, its derivative by the student's logits is

    u_j - q_j U  for a token j of the K,   u_rest q_j / q_rest - q_j U  for any other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .project import default_chunk, project

TOP_FORMS = ("kl", "reverse_kl", "jsd")  # mse compares logits
_NONE = -math.inf


class TopLogProbs(NamedTuple):
    """What is kept of a teacher's distribution at some temperature.

    Attributes:
        ids: (M, K) integers: its K most likely tokens, each once.
        log_probs: (M, K) their log-probabilities, any floating type.
        log_tail: (M,) the logarithm of the mass of the V - K others; -inf if there are none.

    Rounding is taken out where it is used: the K + 1 masses of a row are divided by their sum.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor


@torch.no_grad()
def top_log_probs(
    hidden: Tensor,
    weight: Tensor,
    *,
    k: int,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
) -> TopLogProbs:
    """The K most likely tokens of softmax(logits / temperature), logits = softcap((hidden @ weight.T + bias) * scale).

    Args:
        hidden: (M, d) final hidden states; weight (V, d), bias (V,): the LM head. k >= V takes all of V.
        chunk_size: Rows whose logits exist at a time; default from V.

    Returns: ids int32, log_probs and log_tail in float32 (float64 for float64 inputs).

    >>> top = top_log_probs(torch.ones(1, 2), torch.eye(2), k=1)
    >>> top.ids.tolist(), round(top.log_probs.exp().item(), 4), round(top.log_tail.exp().item(), 4)
    ([[0]], 0.5, 0.5)
    """
    parts = []
    for rows in hidden.split(chunk_size or default_chunk(weight.shape[0], hidden.device.type)):
        z = project(rows, weight, bias, scale, softcap).div_(temperature)
        values, ids = z.topk(min(k, z.shape[-1]), dim=-1)
        log_tail = z.scatter_(1, ids, _NONE).logsumexp(dim=-1)
        total = torch.logaddexp(values.logsumexp(dim=-1), log_tail)
        parts.append(TopLogProbs(ids.int(), values.sub_(total.unsqueeze(1)), log_tail.sub_(total)))
    return TopLogProbs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def top_consistency(
    z: Tensor, teacher: TopLogProbs, *, form: str, temperature: float, out: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """T^2 times each row's divergence over the K + 1 buckets, (C, 1), and its derivative by z.

    Args:
        z: (C, V) logits of the student, float32 or float64; left as it is.
        teacher: Its rows (C, ...), at this temperature.
        form: "kl" (teacher || student), "reverse_kl" or "jsd".
        out: (C, V) scratch, which holds the derivative afterwards.
    """
    ids = teacher.ids.long()
    log_t = torch.cat([teacher.log_probs.to(z.dtype), teacher.log_tail.to(z.dtype).unsqueeze(1)], dim=1)
    log_t = torch.log_softmax(log_t, dim=1)
    rest = torch.div(z, temperature, out=out)
    log_top = rest.gather(1, ids)
    rest.scatter_(1, ids, _NONE)
    # the rest has a maximum and a sum of its own: as 1 - (mass of the K) it would be rounding alone where it is small
    peak = rest.amax(dim=1, keepdim=True)
    peak.masked_fill_(peak == _NONE, 0.0)  # K = V
    total = rest.sub_(peak).exp_().sum(dim=1, keepdim=True)
    log_q = torch.cat([log_top, peak + total.log()], dim=1)
    norm = log_q.logsumexp(dim=1, keepdim=True)
    log_q = log_q - norm
    rows, slope = _BUCKETS[form](log_q, log_t)
    value = temperature**2 * rows.sum(dim=1, keepdim=True)
    if not differentiate:
        return value, None
    slope = slope * temperature  # T^2 of the term, 1 / T of z / T
    whole = slope.sum(dim=1, keepdim=True)
    share = slope[:, -1:] / total.clamp_min(torch.finfo(z.dtype).tiny)
    rest.mul_(share.sub_(whole * (peak - norm).exp()))
    return value, rest.scatter_(1, ids, slope[:, :-1] - whole * log_q[:, :-1].exp())


def _kl(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    return _times(log_t, log_t - log_q), -log_t.exp()


def _reverse_kl(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    rows = _times(log_q, log_q - log_t)
    return rows, rows


def _jsd(log_q: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_q, log_t) - math.log(2.0)
    ours = 0.5 * _times(log_q, log_q - log_m)
    return 0.5 * _times(log_t, log_t - log_m) + ours, ours


def _times(log_p: Tensor, difference: Tensor) -> Tensor:
    """p times a difference of logarithms; nothing where p is."""
    p = log_p.exp()
    return torch.where(p > 0, p * difference, 0.0)


_BUCKETS = {"kl": _kl, "reverse_kl": _reverse_kl, "jsd": _jsd}
