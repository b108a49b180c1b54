"""The terms of one micro-batch of tokens, from the student's final hidden states and the teacher's.

What stands here is what a compiled graph may hold: tensors come in through a [`Plan`], and nothing is asked of data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..fused import TopLogProbs, head_spectral_term, spectral_ratio
from ..fused.head import Head
from ..fused.spectrum import drawn_rows, usable_k
from ..fused.tokens import IGNORED, weighted_token_terms
from ..schedules import Lambdas
from ..teacher.rows import Teacher

if TYPE_CHECKING:
    from .request import StepRequest


class Plan(NamedTuple):
    """What the student's pass needs beside its inputs; tensors are inputs of a compiled graph, the rest constants.

    `numbers` (3,) float64 on the CPU: weights of task, consistency and diversity; `seed` () int64: which rows the
    spectrum takes of too many. As tensors, because a compiler would specialise on every value of a schedule.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    numbers: Tensor
    lambdas: Lambdas | None
    form: str
    temperature: float
    top_k: int
    svd: str
    svd_k: int
    svd_norm: str
    svd_flattened: bool
    svd_centered: bool
    svd_max_rows: int
    factor: Tensor | None
    gram: Tensor | None
    seed: Tensor
    compiled: bool


def make_plan(request: StepRequest, head: Head, teacher_head: Head | None) -> Plan:
    config, lambdas = request.config, request.lambdas
    flattened, centered = config.svd_layout == "flattened", config.svd_input == "centered_logits"
    svd, factor, gram = "", None, None
    if lambdas.svd:
        svd = "features" if config.svd_input == "features" else "head" if head.softcap or head.trains else "factor"
    if svd == "factor":
        made = request.factors.get(head)
        factor, gram = made.centered if centered else made.plain, made.gram(centered=centered)
    return Plan(
        weight=head.weight,
        bias=head.bias,
        scale=head.scale,
        softcap=head.softcap,
        teacher_weight=None if teacher_head is None else teacher_head.weight,
        teacher_bias=None if teacher_head is None else teacher_head.bias,
        numbers=torch.tensor([1.0, lambdas.consistency, lambdas.diversity], dtype=torch.float64),
        lambdas=lambdas if request.measure_shares else None,
        form=config.consistency or "kl",
        temperature=config.temperature or 1.0,
        top_k=config.diversity_top_k or 0,
        svd=svd,
        svd_k=config.svd_top_k or 1,
        svd_norm=config.svd_norm or "nuclear",
        svd_flattened=flattened,
        svd_centered=centered,
        svd_max_rows=config.svd_max_rows,
        factor=factor,
        gram=gram,
        seed=torch.tensor(request.seed, dtype=torch.int64),
        compiled=request.compiled is not None and head.weight.device.type != "cpu",  # as measured: docs/benchmarks.md
    )


def student_pass(
    model: PreTrainedModel, inputs: dict[str, Any], targets: Tensor, teacher: Teacher | None, plan: Plan
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, Tensor] | None, Any]:
    """The student's backbone and its terms: what is compiled as one graph.

    Returns: hidden (B, T, d); sums loss, task, consistency, diversity, entropy, correct, count; the spectral ratio and
    the k it used, where it has an operator; the logits of routers, where `inputs` ask for them.
    """
    outputs = model.base_model(**inputs)
    hidden = outputs.last_hidden_state
    sums, ratio = token_sums(hidden, targets, teacher, plan), spectrum_of(hidden, targets, plan)
    return hidden, sums, ratio, outputs.get("router_logits")


def backbone_pass(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Final hidden states (B, T, d)."""
    return model.base_model(**inputs).last_hidden_state


def token_sums(hidden: Tensor, targets: Tensor, teacher: Teacher | None, plan: Plan) -> tuple[Tensor, ...]:
    """hidden (B, T, d), targets (B, T) aligned, -100 = not counted -> the sums of `student_pass`.

    teacher: Its hidden states (B, T, d), or TopLogProbs (B, T, K), (B, T, K), (B, T).
    """
    states, targets = hidden.to(plan.weight.device), targets.to(plan.weight.device)
    teacher_hidden: Tensor | None = None
    teacher_top: TopLogProbs | None = None
    if isinstance(teacher, TopLogProbs):
        teacher_top = TopLogProbs(*(x.to(states.device).flatten(0, 1) for x in teacher))
    elif teacher is not None:
        teacher_hidden = teacher.to(states.device).flatten(0, 1)
    terms = weighted_token_terms(
        states.flatten(0, 1),
        teacher_hidden,
        plan.weight,
        targets.flatten(),
        plan.numbers,
        form=plan.form,
        temperature=plan.temperature,
        top_k=plan.top_k,
        bias=plan.bias,
        scale=plan.scale,
        softcap=plan.softcap,
        teacher_weight=plan.teacher_weight,
        teacher_bias=plan.teacher_bias,
        compiled=plan.compiled,
        teacher_top=teacher_top,
    )
    return terms.loss, terms.task, terms.consistency, terms.diversity, terms.entropy, terms.correct, terms.count


def spectrum_of(hidden: Tensor, targets: Tensor, plan: Plan) -> tuple[Tensor, Tensor] | None:
    """The spectral ratio and the k it used, 0-d; None where it is off or has no operator (see `head_ratio`)."""
    if plan.svd not in ("factor", "features"):
        return None
    states, counted = hidden.to(plan.weight.device), targets.to(plan.weight.device) != IGNORED
    features = plan.svd == "features"
    return spectral_ratio(
        states if plan.svd_flattened else states.flatten(0, 1),
        counted if plan.svd_flattened else counted.flatten(),
        plan.factor,
        k=plan.svd_k,
        norm=plan.svd_norm,
        gram=plan.gram,
        bias=plan.bias is not None and not features,
        scale=1.0 if features else plan.scale,
        clamp=True,
        max_rows=0 if plan.svd_flattened else plan.svd_max_rows,
        seed=plan.seed,
    )


def head_ratio(plan: Plan, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same where no factor of the head exists: a softcap, or a head that trains."""
    targets = targets.to(plan.weight.device).flatten()
    index = (targets != IGNORED).nonzero().squeeze(-1)
    if 0 < plan.svd_max_rows < index.numel():
        index = index[drawn_rows(index.numel(), plan.svd_max_rows, plan.seed).to(index.device)]
    rows = hidden.to(plan.weight.device).flatten(0, 1)[index]
    columns = min(rows.shape[1] + (plan.bias is not None), plan.weight.shape[0])
    used = usable_k(min(rows.shape[0], columns), plan.svd_k, plan.svd_norm)
    if not used:
        return rows.sum() * 0.0, torch.zeros((), dtype=torch.int64, device=rows.device)
    value = head_spectral_term(
        rows,
        plan.weight,
        k=used,
        norm=plan.svd_norm,
        centered=plan.svd_centered,
        bias=plan.bias,
        scale=plan.scale,
        softcap=plan.softcap,
    )
    return value, torch.tensor(used, device=rows.device)


def shares(plan: Plan, hidden: Tensor, targets: Tensor, teacher: Teacher | None, factor: int) -> Tensor:
    """Norm of each weighted term's gradient over the task's, with respect to the final hidden states: (3,)."""
    assert plan.lambdas is not None
    leaf = hidden.detach().requires_grad_()
    device = plan.weight.device

    def norm(loss: Tensor | None) -> Tensor:
        if loss is None or not loss.requires_grad:
            return torch.zeros((), device=device)
        return torch.autograd.grad(loss, leaf)[0].float().norm().to(device)

    def tokens(task: float, consistency: float, diversity: float) -> Tensor:
        only = plan._replace(numbers=torch.tensor([task, consistency, diversity], dtype=torch.float64))
        return token_sums(leaf, targets, teacher if consistency else None, only)[0]

    with torch.enable_grad():
        task = norm(tokens(1.0, 0.0, 0.0))
        consistency = norm(tokens(0.0, plan.lambdas.consistency / factor, 0.0) if plan.lambdas.consistency else None)
        diversity = norm(tokens(0.0, 0.0, plan.lambdas.diversity) if plan.lambdas.diversity else None)
        spectral = norm(None)
        if plan.svd:  # the token terms are sums, the spectral term stands beside their mean
            found = head_ratio(plan, leaf, targets) if plan.svd == "head" else spectrum_of(leaf, targets, plan)
            assert found is not None
            spectral = norm(found[0] * plan.lambdas.svd * (targets != IGNORED).sum().to(device))
    return torch.stack([consistency, diversity, spectral]) / task.clamp_min(torch.finfo(task.dtype).tiny)
