"""A block of rows: their terms and the gradient by the logits, written out and computed in place. Imports torch alone.

With p = softmax(z) and H its entropy, per row:
    task         d/dz = p - onehot
    -H           d/dz = p (log p + H); over the top K the same on the K renormalised probabilities
    consistency  kl: T (q - p_t), reverse_kl: T q (log q/p_t - KL), jsd: T/2 q (log q/m - KL(q || m)) with q, p_t at
                 temperature T; mse: the projection of the difference of the unit rows
At T = 1 the first three share p = exp(z) / total, which is never formed: its factors go into those of the rows.
Passes and memory are what counts beside the products: everything is in place, in few buffers that are used again, or
compiled from the same source into a few loops.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .top import TopLogProbs, top_consistency

logger = logging.getLogger(__name__)
LOG_HALF = math.log(0.5)
_TOTALS = (1e-8, 1e16)  # sums of exponentials whose logarithm is as good as after taking the maximum off
UNIT_EPS = 1e-6  # of the unit rows, as in regularizers.consistency_rows


class Weights(NamedTuple):
    """Factors of the task loss, the consistency term and minus the entropy in the loss; 0-d tensors when compiled."""

    task: Any
    consistency: Any
    diversity: Any


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
    teacher_top: TopLogProbs | None = None,
    entropic: bool | None = None,
    unit: float = 1.0,
) -> Tensor:
    """Turns z into the gradient of the weighted loss by z (if `differentiate`) and returns what each row adds.

    The gradient, by logits in nats, lacks -weights.task at the labels, which is the caller's to take off, for all its
    blocks at once.

    Args:
        z, z_t: (C, V) logits of student and teacher (or None), float32 or float64; both are overwritten.
        labels: (C,) targets.
        pool: pool(i), i from 2 on, gives (C, V) scratch buffers.
        teacher_top: The teacher's rows in the place of z_t.
        entropic: Whether weights.diversity is not 0; a compiler cannot ask it of a tensor.
        unit: What z and z_t are counted in, in nats: 1, or log 2 where [`in_base_2`] allows it.

    Returns: (C, 5): task, consistency, -H over top_k, H over all, each in units; top-1 hit.
    """
    a, b, c = weights
    entropic = bool(c) if entropic is None else entropic
    top = 0 < top_k < z.shape[-1]
    joint = z_t is not None and form == "kl" and temperature == 1.0
    target = labels.unsqueeze(1)
    consistency, extra = None, None
    if z_t is not None and not joint:
        consistency, extra = _FORMS[form](z, z_t, temperature, pool, differentiate)
    if teacher_top is not None:
        consistency, extra = top_consistency(
            z, teacher_top, form=form, temperature=temperature, out=pool(3), differentiate=differentiate
        )
    if top:
        values, index = z.topk(top_k, dim=-1)
        top_log_p = torch.log_softmax(values, dim=-1)
        top_p = top_log_p.exp()
        top_entropy = -(top_p * top_log_p).sum(dim=-1, keepdim=True)
    if joint and z_t is not None:
        (e, e_t), (total, total_t), (log_total, log_total_t) = _exponentials((z, z_t), (pool(2), pool(3)), unit)
        inverse_t = total_t.reciprocal()
        # the difference first: a difference of two sums would lose what is left of a small divergence
        difference = z_t.sub_(z).mul_(e_t).sum(dim=-1, keepdim=True)
        consistency = (difference * inverse_t).sub_(log_total_t).add_(log_total)
    else:
        (e,), (total,), (log_total,) = _exponentials((z,), (pool(2),), unit)
    chosen = z.gather(1, target)
    task, hit = log_total - chosen, hits(z, labels, chosen)
    inverse = total.reciprocal()  # p = e * inverse, log p = z - log_total
    product = z.mul_(e)
    mean = product.sum(dim=-1, keepdim=True).mul_(inverse)
    entropy = log_total - mean
    consistency = torch.zeros_like(task) if consistency is None else consistency
    rows = torch.cat([task, consistency, -top_entropy if top else -entropy, entropy, hit.to(z.dtype)], dim=1)
    if not differentiate:
        return rows
    share = a + b if joint else a
    if entropic and not top:  # p (share + c (log p + H)), log p + H = z - mean in units
        c = c * unit
        product.mul_(c * inverse).addcmul_(e, (share - c * mean).mul_(inverse))
    else:
        torch.mul(e, share * inverse, out=product)
    if top and entropic:
        product.scatter_add_(1, index, c * top_p * (top_log_p + top_entropy))
    if joint:
        product.addcmul_(e_t, inverse_t * -b)
    elif extra is not None:
        product.add_(extra * b if isinstance(b, Tensor) else extra, alpha=1.0 if isinstance(b, Tensor) else b)
    return rows


BACKEND = "inductor"


@functools.cache
def compiled_chunk(
    form: str, temperature: float, top_k: int, differentiate: bool, entropic: bool
) -> Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]:
    """[`token_chunk`] as compiled loops: f(z, z_t, labels, weights (3,)), for blocks of one shape.

    z_t is left as it is; the rest as there. Where the loops cannot be compiled (no C++ compiler) that is said once, and
    the same source runs eagerly.
    """

    def body(z: Tensor, z_t: Tensor | None, labels: Tensor, weights: Tensor) -> Tensor:
        return token_chunk(
            z,
            None if z_t is None else z_t.clone(),  # of which nothing is left when compiled
            labels,
            Weights(*weights.unbind()),
            form=form,
            temperature=temperature,
            top_k=top_k,
            differentiate=differentiate,
            pool=lambda _: torch.empty_like(z),
            entropic=entropic,
        )

    compiled = torch.compile(body, backend=BACKEND, dynamic=False)
    runs = [compiled]

    def call(z: Tensor, z_t: Tensor | None, labels: Tensor, weights: Tensor) -> Tensor:
        if runs[0] is compiled:
            try:
                return compiled(z, z_t, labels, weights)
            except Exception as error:  # compilers raise all kinds, all of them before a loop has run
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                logger.warning(
                    f"BA-LoRA: the passes over the logits could not be compiled and run eagerly: {type(error).__name__}"
                )
                runs[0] = body
        return body(z, z_t, labels, weights)

    return call


def in_base_2(form: str, temperature: float, top_k: int, vocabulary: int) -> bool:
    """Whether [`token_chunk`] takes logits in units of log 2: where all it needs of them is p and log p at T = 1.

    To the base 2 exponentials cost half on some CPUs.
    """
    return form == "kl" and temperature == 1.0 and not 0 < top_k < vocabulary


def _exponentials(
    logits: tuple[Tensor, ...], out: tuple[Tensor, ...], unit: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """exp(z) in `out`, its sums over a row and their logarithms, (C, 1); z loses its rows' maxima where it must.

    To the base 2 where `unit` is not 1.

    Logits are seldom so large that their exponentials need that, and on a CPU, where looking costs nothing, the two
    passes it takes are a good part of all.
    """
    exp, log = (torch.exp, torch.log) if unit == 1.0 else (torch.exp2, torch.log2)
    if logits[0].device.type == "cpu" and not torch.compiler.is_compiling():
        totals = torch.stack([exp(z, out=e).sum(dim=-1, keepdim=True) for z, e in zip(logits, out, strict=True)])
        low, high = torch.aminmax(totals) if totals.numel() else (totals, totals)
        if totals.numel() and _TOTALS[0] < low.item() and high.item() < _TOTALS[1]:
            return out, totals.unbind(), log(totals).unbind()
    totals = torch.stack(
        [
            exp(z.sub_(z.amax(dim=-1, keepdim=True)), out=e).sum(dim=-1, keepdim=True)
            for z, e in zip(logits, out, strict=True)
        ]
    )
    return out, totals.unbind(), log(totals).unbind()


def hits(z: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
    """Whether z.argmax(-1) is the label, (C, 1): z (C, V), labels (C,), chosen (C, 1) = z at the labels.

    The first of equal maxima counts, as in argmax, which costs a CPU ten times the rest of this: it is asked only where
    the label has the maximum and is not alone there.
    """
    target = labels.unsqueeze(1)
    if torch.compiler.is_compiling():  # no index to carry along: the largest logit, and the largest before the label's
        before = torch.arange(z.shape[-1], device=z.device) < target
        earlier = torch.where(before, z, -math.inf).amax(dim=-1, keepdim=True)
        return (chosen == z.amax(dim=-1, keepdim=True)) & (chosen > earlier)
    if z.device.type != "cpu":
        return z.argmax(dim=-1, keepdim=True) == target
    others = z.scatter_(1, target, -math.inf).amax(dim=-1, keepdim=True)
    z.scatter_(1, target, chosen)
    found, tied = chosen > others, (chosen == others).squeeze(1)
    if bool(tied.any()):
        found[tied] = z[tied].argmax(dim=-1, keepdim=True) == target[tied]
    return found


def _log_softmax(x: Tensor, out: Tensor) -> Tensor:
    return torch.log_softmax(x, dim=-1, out=out)


def _tempered(z: Tensor, z_t: Tensor, temperature: float, pool: Pool) -> tuple[Tensor, Tensor]:
    """log softmax(z / T) in pool(3) and log softmax(z_t / T) in pool(2); z_t is scratch afterwards."""
    log_q = _log_softmax(torch.div(z, temperature, out=pool(2)), pool(3))
    return log_q, _log_softmax(z_t.div_(temperature), pool(2))


def _kl(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    log_q, log_t = _tempered(z, z_t, temperature, pool)
    p_t = torch.exp(log_t, out=z_t)
    value = temperature**2 * log_t.sub_(log_q).mul_(p_t).sum(dim=-1, keepdim=True)
    return value, log_q.exp_().sub_(p_t).mul_(temperature) if differentiate else log_q


def _reverse_kl(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    log_q, log_t = _tempered(z, z_t, temperature, pool)
    q = torch.exp(log_q, out=z_t)
    product = log_q.sub_(log_t).mul_(q)
    rows = product.sum(dim=-1, keepdim=True)
    return temperature**2 * rows, product.sub_(q.mul_(rows)).mul_(temperature) if differentiate else product


def _jsd(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    log_q, log_t = _tempered(z, z_t, temperature, pool)
    log_m = torch.logaddexp(log_q, log_t, out=z_t).add_(LOG_HALF)
    p = torch.exp(log_t, out=pool(4))
    teacher = log_t.sub_(log_m).mul_(p).sum(dim=-1, keepdim=True)
    q = torch.exp(log_q, out=p)
    product = log_q.sub_(log_m).mul_(q)
    rows = product.sum(dim=-1, keepdim=True)
    value = 0.5 * temperature**2 * (teacher + rows)
    return value, product.sub_(q.mul_(rows)).mul_(0.5 * temperature) if differentiate else product


def _mse(z: Tensor, z_t: Tensor, temperature: float, pool: Pool, differentiate: bool) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    length = norm.clamp_min(UNIT_EPS)
    z_t.div_(torch.linalg.vector_norm(z_t, dim=-1, keepdim=True).clamp_min(UNIT_EPS))
    unit = torch.div(z, length, out=pool(3))
    difference = torch.sub(unit, z_t, out=z_t)
    product = torch.mul(difference, difference, out=pool(2))
    vocabulary = z.shape[-1]
    value = product.sum(dim=-1, keepdim=True) / vocabulary
    if not differentiate:
        return value, unit
    along = torch.mul(unit, difference, out=product).sum(dim=-1, keepdim=True)
    along = torch.where(norm > UNIT_EPS, along, 0.0)  # a clamped length is a constant
    return value, torch.sub(difference, unit.mul_(along), out=unit).mul_(2.0 / (vocabulary * length))


_FORMS = {"kl": _kl, "reverse_kl": _reverse_kl, "jsd": _jsd, "mse": _mse}
FORMS = tuple(_FORMS)
