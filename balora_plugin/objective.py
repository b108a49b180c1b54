"""One micro-batch of the NLG objective inside the model's own forward: teacher pass, student pass, terms.

It runs inside the (wrapped) model's forward, so DDP, FSDP and autocast see an ordinary forward: the trainer passes a
[`StepRequest`] as keyword `ba_lora`, everything else reaches the model's original forward unchanged.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .config import RegularizerConfig
from .fused import head_spectral_term, matrix_spectral_term, spectral_term, token_terms
from .fused.project import project
from .head import FactorCache, Head, read_head
from .schedules import Lambdas
from .teacher import TeacherSwitch
from .teacher_cache import TeacherCache, counted_positions

_NOT_FOR_BACKBONE = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict", "use_cache")


@dataclass
class StepRequest:
    """What the trainer asks of one forward pass.

    `lambdas` are the weights in force; lambdas.consistency includes `teacher_factor`, the teacher interval (or 0).
    `teacher_head`: the teacher's head where the student's own has moved and no copy is in the model. `fill`: only make
    sure that the cache holds the batch's teacher states.
    """

    config: RegularizerConfig
    lambdas: Lambdas
    factors: FactorCache = field(default_factory=FactorCache)
    teacher: PreTrainedModel | None = None
    return_logits: bool = False
    measure_shares: bool = False
    teacher_factor: int = 1
    switch: TeacherSwitch | None = None
    cache: TeacherCache | None = None
    teacher_head: Head | None = None
    fill: bool = False
    warn: Callable[[str, str], None] = lambda key, message: None


@dataclass
class StepOutput(ModelOutput):
    """Sums over counted tokens, and the batch's spectral term. `loss` and `svd` are differentiable, 0-d.

    `loss` = task + weighted token terms; `svd` is unweighted, None if it is off or cannot act. `shares` (3,): the norm
    of each weighted term's gradient over the task's, with respect to the final hidden states.
    """

    loss: Tensor | None = None
    task: Tensor | None = None
    consistency: Tensor | None = None
    diversity: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None
    count: Tensor | None = None
    svd: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    shares: Tensor | None = None


def install(model: PreTrainedModel) -> None:
    """Lets a causal language model's forward take the keyword `ba_lora`. Idempotent; other calls are unchanged.

    The patched function looks its model up by `self`, so a deep copy of the model runs on its own weights.
    """
    if getattr(model.forward, "takes_ba_lora", False):
        return
    current = model.__dict__.get("forward")
    original: Callable[..., Any]
    if current is None:
        original = type(model).forward
    elif isinstance(current, types.MethodType) and current.__self__ is model:
        original = current.__func__
    else:

        def original(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return current(*args, **kwargs)

    def forward(self: nn.Module, *args: Any, ba_lora: StepRequest | None = None, **kwargs: Any) -> Any:
        if ba_lora is None:
            return original(self, *args, **kwargs)
        return run_step(self, ba_lora, kwargs)

    # without it hosts would strip the columns they do not see (input_ids) and generate() would refuse real inputs
    vars(forward)["__signature__"] = _unbound_signature(model)
    vars(forward)["takes_ba_lora"] = True
    model.forward = types.MethodType(forward, model)


def _unbound_signature(model: PreTrainedModel) -> inspect.Signature:
    signature = inspect.signature(model.forward)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return signature.replace(parameters=[own, *signature.parameters.values()])


@torch.compiler.disable(recursive=False)
def run_step(model: PreTrainedModel, request: StepRequest, inputs: dict[str, Any]) -> StepOutput:
    """Teacher and student backbone and the terms of one micro-batch.

    Args:
        model: The causal language model (inside any PEFT and parallel wrapper).
        request: What to compute.
        inputs: Its forward's keywords: input_ids (B, L), labels (B, L) with -100 = not counted, or already shifted
            shift_labels (B, L); anything else goes to the backbone as it is.
    """
    lambdas = request.lambdas
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    if labels is None and shifted is None:
        raise ValueError("the batch holds no labels: BA-LoRA needs them to know the counted tokens.")
    router = bool(inputs.pop("output_router_logits", None)) or _wants_router_logits(model)
    needed = counted_positions(inputs) if request.cache is not None else None
    inputs = backbone_inputs(inputs)

    teacher_hidden = teacher_head = None
    if lambdas.consistency:
        teacher_hidden, teacher_head = _teacher_pass(model, request, inputs, needed)
    if request.fill:
        return StepOutput(loss=torch.zeros((), device=inputs["input_ids"].device))
    extra = {"output_router_logits": True} if router else {}
    outputs = model.base_model(**inputs, **extra)
    hidden = outputs.last_hidden_state
    head = read_head(model)
    states = hidden.to(head.weight.device)
    if shifted is None and labels is not None:  # position t predicts label t + 1
        states, shifted = states[:, :-1], labels[:, 1:]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[:, :-1]
    assert shifted is not None
    targets = shifted.to(states.device)
    counted = targets != -100
    rows, targets = states[counted], targets[counted]
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden.to(states.device)[counted]
        if request.cache is not None:
            teacher_hidden = teacher_hidden.to(states.dtype)
    result = _terms(request, head, rows, targets, teacher_hidden, teacher_head, states, counted)
    if router:
        result["aux_loss"] = _router_loss(model, outputs.router_logits, inputs.get("attention_mask"))
    if request.return_logits:
        result["logits"] = project(hidden.to(head.weight.device), head.weight, head.bias, head.scale, head.softcap).to(
            hidden.dtype
        )
    return StepOutput(**result)


@torch.compiler.disable
def _terms(
    request: StepRequest,
    head: Head,
    rows: Tensor,
    targets: Tensor,
    teacher_rows: Tensor | None,
    teacher_head: Head | None,
    states: Tensor,
    counted: Tensor,
) -> dict[str, Any]:
    """rows, teacher_rows (M, d), targets (M,), states (B, T, d), counted (B, T) -> fields of StepOutput."""
    config, lambdas = request.config, request.lambdas

    def tokens(h: Tensor, task: float, consistency: float, diversity: float) -> Any:
        return token_terms(
            h,
            teacher_rows if consistency else None,
            head.weight,
            targets,
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            lambda_task=task,
            lambda_consistency=consistency,
            lambda_diversity=diversity,
            form=config.consistency or "kl",
            temperature=config.temperature or 1.0,
            top_k=config.diversity_top_k or 0,
            teacher_weight=None if teacher_head is None else teacher_head.weight,
            teacher_bias=None if teacher_head is None else teacher_head.bias,
            all_counted=True,
        )

    def svd(h: Tensor) -> Tensor | None:
        return _svd_term(request, head, h, states, counted) if lambdas.svd else None

    terms = tokens(rows, 1.0, lambdas.consistency, lambdas.diversity)
    result: dict[str, Any] = {
        "loss": terms.loss,
        "task": terms.task,
        "consistency": terms.consistency if lambdas.consistency else None,
        "diversity": terms.diversity,
        "entropy": terms.entropy,
        "correct": terms.correct,
        "count": terms.count,
        "svd": svd(rows),
    }
    if request.measure_shares and rows.shape[0]:
        each = lambdas._replace(consistency=lambdas.consistency / max(request.teacher_factor, 1))
        result["shares"] = _shares(rows, each, tokens, svd)
    return result


def _shares(
    rows: Tensor, lambdas: Lambdas, tokens: Callable[..., Any], svd: Callable[[Tensor], Tensor | None]
) -> Tensor:
    """Norm of each weighted term's gradient over the task's, with respect to the final hidden states: (3,)."""
    leaf = rows.detach().requires_grad_()

    def norm(loss: Tensor | None) -> Tensor:
        if loss is None or not loss.requires_grad:
            return torch.zeros((), device=rows.device)
        return torch.autograd.grad(loss, leaf)[0].float().norm()

    with torch.enable_grad():
        task = norm(tokens(leaf, 1.0, 0.0, 0.0).loss)
        consistency = norm(tokens(leaf, 0.0, lambdas.consistency, 0.0).loss if lambdas.consistency else None)
        diversity = norm(tokens(leaf, 0.0, 0.0, lambdas.diversity).loss if lambdas.diversity else None)
        ratio = svd(leaf) if lambdas.svd and leaf.ndim == 2 else None
        # the token terms are sums, the spectral term stands beside their mean
        spectral = norm(None if ratio is None else ratio * lambdas.svd * rows.shape[0])
    return torch.stack([consistency, diversity, spectral]) / task.clamp_min(torch.finfo(task.dtype).tiny)


def _svd_term(request: StepRequest, head: Head, rows: Tensor, states: Tensor, counted: Tensor) -> Tensor | None:
    """The spectral term of this micro-batch, or None where it cannot act (said once)."""
    config = request.config
    norm, k = config.svd_norm or "nuclear", config.svd_top_k or 1
    features = config.svd_input == "features"
    flattened = config.svd_layout == "flattened"
    columns = (
        head.weight.shape[1] if features else min(head.weight.shape[1] + (head.bias is not None), head.weight.shape[0])
    )
    n = counted.shape[0] if flattened else rows.shape[0]
    if n == 0 or (not flattened and rows.shape[0] == 0):
        return None
    limit = min(n, columns if not flattened else columns * counted.shape[1])
    if norm != "none" and limit < 2:
        request.warn(
            "svd_inert",
            f"the SVD term cannot act on a single {'sample' if flattened else 'counted token'}: it is left out of such "
            f"micro-batches. Raise the batch size, or set lambda_svd=0 (now {config.lambda_svd}).",
        )
        return None
    if norm == "nuclear" and k >= limit:
        request.warn(
            "svd_clamped",
            f"svd_top_k={k} is not below min(rows, columns)={limit} of a micro-batch's matrix, where the nuclear ratio "
            f"is constant and trains nothing: using {limit - 1} there. Set svd_top_k lower or the batch size higher.",
        )
        k = limit - 1
    if flattened:
        padded = torch.zeros_like(states).masked_scatter(counted[..., None], rows)  # (B, T, d), zero where not counted
        if features:
            return matrix_spectral_term(padded.flatten(1), k=k, norm=norm)
        return spectral_term(padded, request.factors.get(head), k=k, norm=norm, scale=head.scale)
    if features:
        return matrix_spectral_term(rows, k=k, norm=norm)
    centered = config.svd_input == "centered_logits"
    if head.softcap is not None or head.trains:
        return head_spectral_term(
            rows, head.weight, k=k, norm=norm, centered=centered, bias=head.bias, scale=head.scale, softcap=head.softcap
        )
    return spectral_term(rows, request.factors.get(head), k=k, norm=norm, centered=centered, scale=head.scale)


def backbone_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The part of a causal language model's keywords that its backbone takes."""
    kept = {key: value for key, value in inputs.items() if key not in _NOT_FOR_BACKBONE and value is not None}
    return {**kept, "use_cache": False}


def _teacher_pass(
    model: PreTrainedModel, request: StepRequest, inputs: dict[str, Any], needed: Tensor | None
) -> tuple[Tensor, Head | None]:
    """Final hidden states (B, L, d) of the pre-trained model, and its head if it is not the student's.

    With a cache they are rounded to bfloat16 and zero where `needed` (B, L) is False.
    """

    def run(inputs: dict[str, Any]) -> Tensor:
        if request.teacher is not None:
            with torch.no_grad():
                return request.teacher.base_model(**inputs).last_hidden_state
        with (request.switch or TeacherSwitch(model)).off():
            return model.base_model(**inputs).last_hidden_state

    if request.cache is not None and needed is not None:
        hidden = request.cache.states(inputs, needed, run)
    else:
        hidden = run(inputs)
    if request.teacher_head is not None:
        return hidden, request.teacher_head
    return hidden, read_head(model, teacher=True) if request.teacher is None else read_head(request.teacher)


def _wants_router_logits(model: PreTrainedModel) -> bool:
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def _router_loss(model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The model's own load-balancing loss (mixture-of-experts), unweighted."""
    module = sys.modules[type(model).__module__]
    function = getattr(module, "load_balancing_loss_func", None)
    if function is None:
        raise ValueError(
            f"{type(model).__name__} returns router logits, but its load-balancing loss is not known: set "
            "output_router_logits=False in the model's config (TRL: router_aux_loss_coef=0.0)."
        )
    config = model.config.get_text_config()
    experts = next(
        (
            value
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
            if (value := getattr(config, name, None))
        ),
        None,
    ) or getattr(model, "num_experts", None)
    return function(router_logits, experts, config.num_experts_per_tok, attention_mask)
