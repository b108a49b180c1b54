"""The consistency term from the teacher's K most likely tokens and the mass of all others. Imports torch alone.

Both models' distributions are taken over K + 1 buckets: the teacher's K most likely tokens, and the rest of the
vocabulary as one (docs/method.md). With u_b the derivative of a divergence by log q_b, up to a multiple of q_b, which
the normalisation takes away, and U the sum of all u_b, its derivative by the student's logits is

    u_j - q_j U  for a token j of the K,   u_rest q_j / q_rest - q_j U  for any other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..regularizers import FORMS
from .head import Head
from .loss import TermForm, TopLogProbs
from .project import default_chunk, project

TOP_FORMS = tuple(name for name, form in FORMS.items() if form.buckets is not None)
_NONE = -math.inf


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
    head = Head(weight, bias, scale, softcap)
    parts = []
    for rows in hidden.split(chunk_size or default_chunk(weight.shape[0], hidden.device.type)):
        z = project(rows, head).div_(temperature)
        values, ids = z.topk(min(k, z.shape[-1]), dim=-1)
        log_tail = z.scatter_(1, ids, _NONE).logsumexp(dim=-1)
        total = torch.logaddexp(values.logsumexp(dim=-1), log_tail)
        parts.append(TopLogProbs(ids.int(), values.sub_(total.unsqueeze(1)), log_tail.sub_(total)))
    return TopLogProbs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def top_consistency(
    z: Tensor, teacher: TopLogProbs, form: TermForm, *, out: Tensor, differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """T^2 times each row's divergence over the K + 1 buckets, (C, 1), and its derivative by z.

    Args:
        z: (C, V) logits of the student, float32 or float64; left as it is.
        teacher: Its rows (C, ...), at the form's temperature.
        form: Of which one of TOP_FORMS is taken.
        out: (C, V) scratch, which holds the derivative afterwards.
    """
    buckets, temperature = FORMS[form.consistency].buckets, form.temperature
    assert buckets is not None
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
    rows, slope = buckets(log_q, log_t)
    value = temperature**2 * rows.sum(dim=1, keepdim=True)
    if not differentiate:
        return value, None
    slope = slope * temperature  # T^2 of the term, 1 / T of z / T
    whole = slope.sum(dim=1, keepdim=True)
    share = slope[:, -1:] / total.clamp_min(torch.finfo(z.dtype).tiny)
    rest.mul_(share.sub_(whole * (peak - norm).exp()))
    return value, rest.scatter_(1, ids, slope[:, :-1] - whole * log_q[:, :-1].exp())
