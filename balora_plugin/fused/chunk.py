"""A block of rows: their terms and the gradient by the logits, written out and computed in place. Imports torch alone.

With p = softmax(z) and H its entropy, per row:
    task         d/dz = p - onehot; smoothed p - ((1 - s) onehot + s / V); dft p_label (p - onehot)
    -H           d/dz = p (log p + H); over the top K the same on the K renormalised probabilities
    consistency  as the form's file in balora_plugin/consistency/ has it
All share p = exp(z) / total, the form where it can at T = 1 (`Form.joint`). It is never formed: its factors go into
those of the rows.
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

from ..consistency._form import Exponentials, Pool
from ..regularizers import FORMS
from .loss import TaskForm, TermForm, TopLogProbs
from .top import top_consistency

logger = logging.getLogger(__name__)
_TOTALS = (1e-8, 1e16)  # sums of exponentials whose logarithm is as good as after taking the maximum off


class Weights(NamedTuple):
    """Factors of the task loss, the consistency term and minus the entropy in the loss; 0-d tensors when compiled."""

    task: Any
    consistency: Any
    diversity: Any


class Rows(NamedTuple):
    """Rows of the student, states (M, d) or logits (M, V), their targets (M,), and the teacher's: the like, or its
    log-probabilities, or None. `task` (M,): factors of each row's task loss; None: 1, which the form dft does not take.
    """

    student: Tensor
    labels: Tensor
    teacher: Tensor | TopLogProbs | None
    task: Tensor | None = None

    def at(self, index: Tensor | slice) -> Rows:
        teacher = self.teacher
        if isinstance(teacher, TopLogProbs):
            teacher = TopLogProbs(*(x[index] for x in teacher))
        elif teacher is not None:
            teacher = teacher[index]
        return Rows(self.student[index], self.labels[index], teacher, None if self.task is None else self.task[index])


def token_chunk(
    block: Rows,
    weights: Weights,
    form: TermForm,
    *,
    pool: Pool,
    differentiate: bool,
    entropic: bool | None = None,
    unit: float = 1.0,
) -> Tensor:
    """Turns logits into the gradient of the weighted loss by them (if `differentiate`); returns what each row adds.

    The gradient, by logits in nats, lacks -weights.task (times block.task, and 1 - smoothing) at the labels, which is
    the caller's to take off, for all its blocks at once.

    Args:
        block: Logits (C, V) of the student, float32 or float64, and of the teacher; both are overwritten. With the form
            dft `task` is multiplied by the probabilities of the labels.
        pool: pool(i), i from 2 on, gives (C, V) scratch buffers.
        entropic: Whether weights.diversity is not 0; a compiler cannot ask it of a tensor.
        unit: What logits are counted in, in nats: 1, or log 2 where [`in_base_2`] allows it.

    Returns: (C, 5): task, consistency, -H over top_k, H over all, each in units; top-1 hit.
    """
    z, labels, teacher, factors = block
    a, b, c = weights
    entropic = bool(c) if entropic is None else entropic
    top = 0 < form.top_k < z.shape[-1]
    target = labels.unsqueeze(1)
    joint = FORMS[form.consistency].joint if form.temperature == 1.0 and isinstance(teacher, Tensor) else None
    consistency, extra, e_t = None, None, None
    if isinstance(teacher, TopLogProbs):
        consistency, extra = top_consistency(z, teacher, form, out=pool(3), differentiate=differentiate)
    elif teacher is not None and joint is None:
        in_place = FORMS[form.consistency].in_place
        consistency, extra = in_place(z, teacher, form.temperature, pool, differentiate)
    if top:
        values, index = z.topk(form.top_k, dim=-1)
        top_log_p = torch.log_softmax(values, dim=-1)
        top_p = top_log_p.exp()
        top_entropy = -(top_p * top_log_p).sum(dim=-1, keepdim=True)
    if joint is not None and isinstance(teacher, Tensor):
        e, e_t = _exponentials((z, teacher), (pool(2), pool(3)), unit)
        consistency = joint(z, teacher, e, e_t)
    else:
        (e,) = _exponentials((z,), (pool(2),), unit)
    chosen = z.gather(1, target)
    task, hit = _task(z, chosen, e, form.task, factors, unit), hits(z, labels, chosen)
    task, a = by_row(task, factors), by_row(a, factors)
    product = z.mul_(e.values)  # p = e.values * e.inverse, log p = z - e.log_total
    mean = product.sum(dim=-1, keepdim=True).mul_(e.inverse)
    entropy = e.log_total - mean
    consistency = torch.zeros_like(task) if consistency is None else consistency
    rows = torch.cat([task, consistency, -top_entropy if top else -entropy, entropy, hit.to(z.dtype)], dim=1)
    if not differentiate:
        return rows
    share = a if e_t is None else a + b
    if entropic and not top:  # p (share + c (log p + H)), log p + H = z - mean in units
        c = c * unit
        product.mul_(c * e.inverse).addcmul_(e.values, (share - c * mean).mul_(e.inverse))
    else:
        torch.mul(e.values, share * e.inverse, out=product)
    _take_off_the_even_part(product, a, form.task)
    if top and entropic:
        product.scatter_add_(1, index, c * top_p * (top_log_p + top_entropy))
    if e_t is not None:
        product.addcmul_(e_t.values, e_t.inverse * -b)
    elif extra is not None:
        product.add_(extra * b if isinstance(b, Tensor) else extra, alpha=1.0 if isinstance(b, Tensor) else b)
    return rows


BACKEND = "inductor"


@functools.cache
def compiled_chunk(form: TermForm, differentiate: bool, entropic: bool) -> Callable[[Rows, Tensor], Tensor]:
    """[`token_chunk`] as compiled loops: f(block, weights (3,)), for blocks of one shape, without TopLogProbs.

    The teacher's logits are left as they are; the rest as there. Where the loops cannot be compiled (no C++ compiler)
    that is said once, and the same source runs eagerly.
    """

    def body(z: Tensor, z_t: Tensor | None, labels: Tensor, task: Tensor | None, weights: Tensor) -> Tensor:
        return token_chunk(
            Rows(z, labels, None if z_t is None else z_t.clone(), task),  # a copy that compiling takes away again
            Weights(*weights.unbind()),
            form,
            pool=lambda _: torch.empty_like(z),
            differentiate=differentiate,
            entropic=entropic,
        )

    compiled = torch.compile(body, backend=BACKEND, dynamic=False)
    runs = [compiled]

    def call(block: Rows, weights: Tensor) -> Tensor:
        assert not isinstance(block.teacher, TopLogProbs)
        arguments = (block.student, block.teacher, block.labels, block.task, weights)
        if runs[0] is compiled:
            try:
                return compiled(*arguments)
            except Exception as error:  # compilers raise all kinds, all of them before a loop has run
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                logger.warning(
                    f"BA-LoRA: the passes over the logits could not be compiled and run eagerly: {type(error).__name__}"
                )
                runs[0] = body
        return body(*arguments)

    return call


def in_base_2(form: TermForm, vocabulary: int) -> bool:
    """Whether [`token_chunk`] takes logits in units of log 2: where all it needs of them is p and log p at T = 1.

    To the base 2 exponentials cost half on some CPUs.
    """
    return FORMS[form.consistency].joint is not None and form.temperature == 1.0 and not 0 < form.top_k < vocabulary


def _exponentials(logits: tuple[Tensor, ...], out: tuple[Tensor, ...], unit: float) -> list[Exponentials]:
    """Of each of `logits` (C, V), in `out`; z loses its rows' maxima where it must. To the base 2 if `unit` is not 1.

    Logits are seldom so large that their exponentials need that, and on a CPU, where looking costs nothing, the two
    passes it takes are a good part of all.
    """
    exp, log = (torch.exp, torch.log) if unit == 1.0 else (torch.exp2, torch.log2)
    totals = None
    if logits[0].device.type == "cpu" and not torch.compiler.is_compiling():
        totals = torch.stack([exp(z, out=e).sum(dim=-1, keepdim=True) for z, e in zip(logits, out, strict=True)])
        low, high = torch.aminmax(totals) if totals.numel() else (totals, totals)
        if not totals.numel() or not _TOTALS[0] < low.item() or not high.item() < _TOTALS[1]:
            totals = None
    if totals is None:
        totals = torch.stack(
            [
                exp(z.sub_(z.amax(dim=-1, keepdim=True)), out=e).sum(dim=-1, keepdim=True)
                for z, e in zip(logits, out, strict=True)
            ]
        )
    columns = zip(out, totals.reciprocal().unbind(), log(totals).unbind(), strict=True)
    return [Exponentials(*column) for column in columns]


def _task(z: Tensor, chosen: Tensor, e: Exponentials, form: TaskForm, factors: Tensor | None, unit: float) -> Tensor:
    """Each row's task loss (C, 1) without its factor, in units, from its logits z (C, V), `chosen` at its label.

    With dft the factors (C,) take the label's probability in, in place.
    """
    if form.dft:
        assert factors is not None
        log_p = chosen - e.log_total
        factors.mul_((log_p.exp() if unit == 1.0 else log_p.exp2()).squeeze(1))
    if form.smoothing:  # -log p_j is log_total - z_j: their mean takes that of z
        chosen = torch.lerp(chosen, z.mean(dim=-1, keepdim=True), form.smoothing)
    return e.log_total - chosen


def _take_off_the_even_part(gradient: Tensor, a: Any, form: TaskForm) -> None:
    """Of a smoothed target, which every token has: from the gradient (C, V), `a` the task's factor of each row."""
    if form.smoothing:
        gradient.sub_(a * (form.smoothing / gradient.shape[-1]))


def by_row(value: Any, factors: Tensor | None) -> Any:
    """`value`, a number or (C, 1), times a row's factor (C,); as it is without factors."""
    return value if factors is None else value * factors.unsqueeze(1)


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
