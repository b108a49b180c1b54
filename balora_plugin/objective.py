"""One micro-batch of the NLG objective inside the model's own forward: teacher pass, student pass, terms.

It runs inside the (wrapped) model's forward, so DDP, FSDP and autocast see an ordinary forward: the trainer passes a
[`StepRequest`] as keyword `ba_lora`, everything else reaches the model's original forward unchanged.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .attention import implementation_of, is_flash
from .config import RegularizerConfig
from .cost import CostMeter
from .documents import counted_positions, with_boundaries
from .fused import TopLogProbs
from .fused.project import project
from .fused.tokens import IGNORED
from .head import FactorCache, Head, check_head_now, read_head
from .schedules import Lambdas
from .teacher import TeacherSwitch
from .teacher_cache import TeacherCache
from .teacher_rows import Teacher
from .terms import backbone_pass, head_ratio, make_plan, shares, spectrum_of, token_sums

if TYPE_CHECKING:  # it imports dynamo, which takes seconds
    from .compiled_layers import CompiledLayers

_NOT_FOR_BACKBONE = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict", "use_cache")


@dataclass
class StepRequest:
    """What the trainer asks of one forward pass.

    `lambdas` are the weights in force; lambdas.consistency includes `teacher_factor`, the teacher interval (or 0).
    `teacher_head`: the teacher's head where the student's own has moved and no copy is in the model. `fill`: only make
    sure that the cache holds the batch's teacher states. `head_only`: a classifier's head on the pre-trained features.
    `counts`: False where a classifier's samples were all evaluated before.
    """

    config: RegularizerConfig
    lambdas: Lambdas
    factors: FactorCache = field(default_factory=FactorCache)
    teacher: PreTrainedModel | None = None
    return_logits: bool = False
    measure_shares: bool = False
    teacher_factor: int = 1
    switch: TeacherSwitch | None = None
    compiled: CompiledPasses | None = None
    seed: int = 0
    cache: TeacherCache | None = None
    teacher_head: Head | None = None
    fill: bool = False
    head_only: bool = False
    counts: bool = True
    meter: CostMeter | None = None

    def part(self, name: str) -> AbstractContextManager[None]:
        """Counts what runs inside as this part of the run's cost."""
        return nullcontext() if self.meter is None else self.meter.part(name)


class CompiledPasses(NamedTuple):
    """[`backbone_pass`] and [`student_pass`], each compiled as one graph; or `layers`, and no pass of the student's."""

    teacher: Callable[..., Any]
    student: Callable[..., Any] | None = None
    layers: CompiledLayers | None = None

    def in_use(self) -> str:
        """How the student is compiled, if compiling did not fail: "whole" (its terms in its graph), "layers" or ""."""
        if self.layers is not None:
            return "" if self.layers.failed else "layers"
        return "whole" if getattr(self.student, "compiled", None) is not None else ""


@dataclass
class StepOutput(ModelOutput):
    """Sums over counted tokens, and the batch's spectral term. `loss` and `svd` are differentiable, 0-d.

    `loss` = task + weighted token terms; `svd` is unweighted, None if it is off; `svd_used_k` is 0 where it cannot act
    (and `svd` 0). `shares` (3,): the norm of each weighted term's gradient over the task's, with respect to the final
    hidden states. A classifier's are sums over samples: `svd` is in `loss` too, and `svd_count`, `diversity_count` say
    for how many samples the batch's statistics stand.
    """

    loss: Tensor | None = None
    task: Tensor | None = None
    consistency: Tensor | None = None
    diversity: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None
    count: Tensor | None = None
    svd: Tensor | None = None
    svd_used_k: Tensor | None = None
    svd_count: Tensor | None = None
    diversity_count: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    shares: Tensor | None = None


Step = Callable[[Any, StepRequest, dict[str, Any]], StepOutput]


def install(model: PreTrainedModel, step: Step | None = None) -> None:
    """Lets a model's forward take the keyword `ba_lora`. Idempotent; other calls are unchanged.

    `step` answers such a call: [`run_step`] for causal language models, or another family's. The patched function looks
    its model up by `self`, so a deep copy of the model runs on its own weights.
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
        return (step or run_step)(self, ba_lora, kwargs)

    # without it hosts would strip the columns they do not see (input_ids) and generate() would refuse real inputs
    vars(forward)["__signature__"] = _unbound_signature(model)
    vars(forward)["takes_ba_lora"] = True
    model.forward = types.MethodType(forward, model)


@contextmanager
def without_input_hooks(model: PreTrainedModel) -> Iterator[None]:
    """Inside, embeddings are without the hooks that make them require gradients: no graph can hold them, and
    non-reentrant checkpointing needs none. Not by disable_input_require_grads(), which forgets all but those of the
    last of several enablings, and for good: a pass that is not compiled after all may need them.
    """
    hooks = model.get_input_embeddings()._forward_hooks
    before = list(hooks.items())
    for key, hook in before:
        if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)


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

    compiled = request.compiled
    if compiled is not None and is_flash(implementation_of(model)):
        inputs = with_boundaries(inputs)
    check_head_now(model, inputs["input_ids"].device)
    head = read_head(model)
    teacher = teacher_head = None
    if lambdas.consistency:
        with request.part("teacher"):
            teacher, teacher_head = _teacher_pass(model, request, inputs, needed, head)
    if request.fill:
        return StepOutput(loss=torch.zeros((), device=inputs["input_ids"].device))
    extra = {"output_router_logits": True} if router else {}
    targets = shifted
    if targets is None:  # position t predicts label t + 1
        assert labels is not None
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    plan = make_plan(request, head, teacher_head)
    whole = not (request.return_logits or request.measure_shares)
    if whole and compiled is not None and compiled.student is not None:
        hidden, sums, ratio, routed = compiled.student(model, {**inputs, **extra}, targets, teacher, plan)
    else:
        with nullcontext() if compiled is None or compiled.layers is None else compiled.layers.inside(model):
            outputs = model.base_model(**inputs, **extra)
        hidden, routed = outputs.last_hidden_state, outputs.get("router_logits")
        with request.part("token_terms"):
            sums = token_sums(hidden, targets, teacher, plan)
        with request.part("spectrum"):
            ratio = spectrum_of(hidden, targets, plan)
    loss, task, consistency, diversity, entropy, correct, count = sums
    result: dict[str, Any] = {
        "loss": loss.clone(),  # a view of the operator's sums otherwise: FSDP2 warns that hooks on it may be lost
        "task": task,
        "consistency": consistency if lambdas.consistency else None,
        "diversity": diversity,
        "entropy": entropy,
        "correct": correct,
        "count": count,
    }
    if plan.svd == "head":
        ratio = head_ratio(plan, hidden, targets)
    if ratio is not None:
        result |= {"svd": ratio[0], "svd_used_k": ratio[1]}
    if request.measure_shares:
        result["shares"] = shares(plan, hidden, targets, teacher, max(request.teacher_factor, 1))
    if router:
        result["aux_loss"] = _router_loss(model, routed, inputs.get("attention_mask"))
    if request.return_logits:
        result["logits"] = project(hidden.to(head.weight.device), head.weight, head.bias, head.scale, head.softcap).to(
            hidden.dtype
        )
    return StepOutput(**result)


def backbone_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The part of a causal language model's keywords that its backbone takes."""
    kept = {key: value for key, value in inputs.items() if key not in _NOT_FOR_BACKBONE and value is not None}
    return {**kept, "use_cache": False}


def _teacher_pass(
    model: PreTrainedModel, request: StepRequest, inputs: dict[str, Any], needed: Tensor | None, student_head: Head
) -> tuple[Teacher, Head | None]:
    """Final hidden states (B, L, d) of the pre-trained model, and its head if it is not the student's.

    With a cache they are rounded to bfloat16 and zero where `needed` (B, L) is False, or they are the log-probabilities
    that it has instead, which need no head.
    """
    forward = backbone_pass if request.compiled is None else request.compiled.teacher

    def run(inputs: dict[str, Any]) -> Tensor:
        if request.teacher is not None:
            with torch.no_grad():
                return forward(request.teacher, inputs)
        with (request.switch or TeacherSwitch(model)).off():
            return forward(model, inputs)

    def head() -> Head:
        if request.teacher_head is not None:
            return request.teacher_head
        if request.teacher is not None:
            return read_head(request.teacher)
        return read_head(model, teacher=True, student=student_head)

    if request.cache is None or needed is None:
        return run(inputs), head()
    found = request.cache.states(inputs, needed, run, head)
    return found, None if isinstance(found, TopLogProbs) else head()


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
