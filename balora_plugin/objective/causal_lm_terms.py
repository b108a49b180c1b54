"""The terms of one micro-batch of tokens, from the student's final hidden states and the teacher's.

What stands here is what a compiled graph may hold: tensors come in by the named tuples, and nothing is asked of data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..fused import TopLogProbs, head_spectral_term, spectral_ratio
from ..fused.head import Head
from ..fused.loss import IGNORED, MetRows, TeacherStates, TermForm, TokenLoss
from ..fused.spectrum import drawn_rows, usable_k
from ..fused.tokens import weighted_token_terms
from ..pretrained.backbone import run_backbone
from ..schedules import Lambdas
from .request import Part, StepRequest, uncounted
from .some_rows import counted_with_teacher, of_rows


class SpectrumRequest(NamedTuple):
    """Which singular values are asked for; tensors are inputs of a compiled graph, the rest constants.

    Attributes:
        of: "factor": the logits', by the head's `factor` and `gram`; "head": the logits', where the head has no factor
            (a softcap, or a head that trains); "features": the final hidden states'.
        flattened: One row a sample.
        max_rows: At most so many counted tokens, drawn by `seed` () int64: a tensor, which changes at every step.
    """

    of: str
    k: int
    norm: str
    flattened: bool
    centered: bool
    max_rows: int
    seed: Tensor
    factor: Tensor | None = None
    gram: Tensor | None = None


def token_loss(
    request: StepRequest,
    head: Head,
    teacher: TeacherStates | TopLogProbs | None,
    task_rows: Tensor | None = None,
    met: MetRows | None = None,
) -> TokenLoss:
    """What a request asks of the tokens; the teacher's tensors (B, T, ...), `task_rows` of the targets (B, T).

    `met`: the rows that the teacher's tensors are of; None: all.
    """
    config, lambdas = request.config, request.measured
    name, temperature, top_k = config.consistency or "kl", config.temperature or 1.0, config.diversity_top_k or 0
    return TokenLoss(
        head=head.alone,
        teacher=teacher,
        form=TermForm(name, temperature, top_k, request.task_form),
        weights=torch.tensor([1.0, lambdas.consistency, lambdas.diversity], dtype=torch.float64),
        compiled=request.compiled is not None and head.weight.device.type != "cpu",  # as measured: docs/benchmarks.md
        task_rows=task_rows,
        met=None if teacher is None else met,
    )


def spectrum_request(request: StepRequest, head: Head) -> SpectrumRequest | None:
    """What a request asks of the spectrum; None where that term is off."""
    config = request.config
    if not request.measured.svd or (not request.lambdas.svd and head.weight.device.type == "mps"):  # has no float64
        return None
    of = "features" if config.svd_input == "features" else "head" if head.softcap or head.trains else "factor"
    centered = config.svd_input == "centered_logits"
    factor = gram = None
    if of == "factor":
        made = request.factors.get(head)
        factor, gram = made.centered if centered else made.plain, made.gram(centered=centered)
    return SpectrumRequest(
        of=of,
        k=config.svd_top_k or 1,
        norm=config.svd_norm or "nuclear",
        flattened=config.svd_layout == "flattened",
        centered=centered,
        max_rows=config.svd_max_rows,
        seed=torch.tensor(request.seed, dtype=torch.int64),
        factor=factor,
        gram=gram,
    )


def student_pass(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    targets: Tensor,
    loss: TokenLoss,
    spectrum: SpectrumRequest | None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, Tensor] | None, Any]:
    """The student's backbone and its terms: what is compiled as one graph.

    `inputs` may hold rows and positions beyond those of `targets` (B, T), which count nothing here.

    Returns: hidden of all of them (B', T', d); sums loss, task, consistency, diversity, entropy, correct, count; the
    spectral ratio and the k it used, where it has an operator; the logits of routers, where `inputs` ask for them.
    """
    outputs = run_backbone(model, inputs)
    hidden = outputs.last_hidden_state
    own = own_positions(hidden, targets)
    sums, ratio = token_sums(own, targets, loss), token_spectrum(own, targets, loss.head, spectrum)
    return hidden, sums, ratio, outputs.get("router_logits")


def own_positions(hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden (B', T', d) -> that of the batch's own rows and positions, of which `targets` (B, T) are: the first."""
    rows, length = targets.shape
    return hidden if hidden.shape[:2] == targets.shape else hidden[:rows, :length]


def backbone_pass(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Final hidden states (B, T, d)."""
    return run_backbone(model, inputs).last_hidden_state


def token_sums(hidden: Tensor, targets: Tensor, loss: TokenLoss) -> tuple[Tensor, ...]:
    """hidden (B, T, d), targets (B, T) aligned, -100 = not counted -> the sums of `student_pass`.

    The loss's teacher: its hidden states (B, T, d), or TopLogProbs (B, T, K), (B, T, K), (B, T). Where it says that k
    rows are met, it is of these alone, (k, T, ...).
    """
    if loss.met is not None:
        return _sums_of_both(hidden, targets, loss, loss.met)
    device, teacher = loss.head.weight.device, loss.teacher
    if isinstance(teacher, TopLogProbs):
        teacher = TopLogProbs(*(x.to(device).flatten(0, 1) for x in teacher))
    elif teacher is not None:
        teacher = TeacherStates(teacher.hidden.to(device).flatten(0, 1), teacher.head)
    factors = None if loss.task_rows is None else loss.task_rows.to(device).flatten()
    terms = weighted_token_terms(
        hidden.to(device).flatten(0, 1),
        targets.to(device).flatten(),
        loss._replace(teacher=teacher, task_rows=factors),
    )
    return terms.loss, terms.task, terms.consistency, terms.diversity, terms.entropy, terms.correct, terms.count


def _sums_of_both(hidden: Tensor, targets: Tensor, loss: TokenLoss, met: MetRows) -> tuple[Tensor, ...]:
    """The sums over the rows that meet the teacher and those over the others, which need no logits of a teacher."""
    found = []
    for rows, teacher in ((met.met, loss.teacher), (met.others, None)):
        factors = None if loss.task_rows is None else of_rows(loss.task_rows, rows)
        part = loss._replace(teacher=teacher, task_rows=factors, met=None)
        found.append(token_sums(of_rows(hidden, rows), of_rows(targets, rows), part))
    return tuple(one + other for one, other in zip(*found, strict=True))


def token_spectrum(
    hidden: Tensor, targets: Tensor, head: Head, spectrum: SpectrumRequest | None
) -> tuple[Tensor, Tensor] | None:
    """The spectral ratio and the k it used, 0-d; None where it is off or has no operator (see `head_spectrum`)."""
    if spectrum is None or spectrum.of == "head":
        return None
    states, counted = hidden.to(head.weight.device), targets.to(head.weight.device) != IGNORED
    features, flattened = spectrum.of == "features", spectrum.flattened
    return spectral_ratio(
        states if flattened else states.flatten(0, 1),
        counted if flattened else counted.flatten(),
        spectrum.factor,
        k=spectrum.k,
        norm=spectrum.norm,
        gram=spectrum.gram,
        bias=head.bias is not None and not features,
        scale=1.0 if features else head.scale,
        clamp=True,
        max_rows=0 if flattened else spectrum.max_rows,
        seed=spectrum.seed,
    )


def head_spectrum(hidden: Tensor, targets: Tensor, head: Head, spectrum: SpectrumRequest) -> tuple[Tensor, Tensor]:
    """The same where no factor of the head exists: a softcap, or a head that trains."""
    weight, bias = head.weight, head.bias
    targets = targets.to(weight.device).flatten()
    index = (targets != IGNORED).nonzero().squeeze(-1)
    if 0 < spectrum.max_rows < index.numel():
        index = index[drawn_rows(index.numel(), spectrum.max_rows, spectrum.seed).to(index.device)]
    rows = hidden.to(weight.device).flatten(0, 1)[index]
    columns = min(rows.shape[1] + (bias is not None), weight.shape[0])
    used = usable_k(min(rows.shape[0], columns), spectrum.k, spectrum.norm)
    if not used:
        return rows.sum() * 0.0, torch.zeros((), dtype=torch.int64, device=rows.device)
    value = head_spectral_term(
        rows,
        weight,
        k=used,
        norm=spectrum.norm,
        centered=spectrum.centered,
        bias=bias,
        scale=head.scale,
        softcap=head.softcap,
    )
    return value, torch.tensor(used, device=rows.device)


def _as_of_all(targets: Tensor, met: MetRows | None) -> Tensor:
    """What the norm of a gradient over the tokens with a teacher is to be multiplied by to stand for all, 0-d.

    The gradient by the states of one token does not depend on another's, so that squares of norms add up over them.
    """
    taught = counted_with_teacher(targets, met)
    return torch.ones(()) if taught is None else ((targets != IGNORED).sum() / taught.clamp(min=1)).sqrt()


def shares(
    hidden: Tensor,
    targets: Tensor,
    loss: TokenLoss,
    spectrum: SpectrumRequest | None,
    lambdas: Lambdas,
    part: Part = uncounted,
) -> Tensor:
    """Norm of each weighted term's gradient over the task's, with respect to the final hidden states: (3,).

    `part` counts what the task costs alone, which the terms are compared with.
    """
    leaf = hidden.detach().requires_grad_()
    device = loss.head.weight.device

    def norm(value: Tensor | None) -> Tensor:
        if value is None or not value.requires_grad:
            return torch.zeros((), device=device)
        return torch.autograd.grad(value, leaf)[0].float().norm().to(device)

    def tokens(task: float, consistency: float, diversity: float) -> Tensor:
        weights = torch.tensor([task, consistency, diversity], dtype=torch.float64)
        taught = (loss.teacher, loss.met) if consistency else (None, None)
        only = loss._replace(weights=weights, teacher=taught[0], met=taught[1])
        return token_sums(leaf, targets, only)[0]

    with torch.enable_grad():
        with part("task_alone"):
            alone = tokens(1.0, 0.0, 0.0)
        task = norm(alone)
        consistency = norm(tokens(0.0, lambdas.consistency, 0.0) if lambdas.consistency else None)
        consistency = consistency * _as_of_all(targets, loss.met).to(device)
        diversity = norm(tokens(0.0, 0.0, lambdas.diversity) if lambdas.diversity else None)
        spectral = norm(None)
        if spectrum is not None:  # the token terms are sums, the spectral term stands beside their mean
            found = token_spectrum(leaf, targets, loss.head, spectrum)
            ratio, _ = found or head_spectrum(leaf, targets, loss.head, spectrum)
            spectral = norm(ratio * lambdas.svd * (targets != IGNORED).sum().to(device))
    return torch.stack([consistency, diversity, spectral]) / task.clamp_min(torch.finfo(task.dtype).tiny)
