"""One micro-batch of the NLG objective inside the model's own forward: teacher pass, student pass, terms.

It runs inside the (wrapped) model's forward, so DDP, FSDP and autocast see an ordinary forward: the trainer passes a
[`StepRequest`] as keyword `ba_lora`, everything else reaches the model's original forward unchanged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..fused import TopLogProbs
from ..fused.head import Head
from ..fused.loss import IGNORED, PLAIN_TASK, TeacherStates
from ..fused.project import project
from ..pretrained.attention import implementation_of, is_flash
from ..pretrained.backbone import run_backbone
from ..pretrained.lm_head import check_head_now, read_head
from ..pretrained.switch import TeacherSwitch
from .anchors import anchor_term, join
from .batches import check_task_weights, check_tokens, counted_positions, main_input, with_boundaries
from .causal_lm_terms import (
    backbone_pass,
    head_spectrum,
    own_positions,
    shares,
    spectrum_request,
    token_loss,
    token_spectrum,
    token_sums,
)
from .measured import of_tokens
from .request import StepOutput, StepRequest
from .some_rows import counted_with_teacher, of_rows
from .two_passes import TwoPasses

_NOT_FOR_BACKBONE = ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict", "use_cache")


@torch.compiler.disable(recursive=False)
def causal_lm_step(model: PreTrainedModel, request: StepRequest, inputs: dict[str, Any]) -> StepOutput:
    """Teacher and student backbone and the terms of one micro-batch.

    Args:
        model: The causal language model (inside any PEFT and parallel wrapper).
        request: What to compute.
        inputs: Its forward's keywords: input_ids (B, L) or inputs_embeds (B, L, d); labels (B, L) with -100 = not
            counted, or already shifted shift_labels (B, L); anything else goes to the backbone as it is.
    """
    lambdas = request.measured
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    marked = labels if shifted is None else shifted
    if marked is None:
        raise ValueError("the batch holds no labels: BA-LoRA needs them to know the counted tokens.")
    router = bool(inputs.pop("output_router_logits", None)) or _wants_router_logits(model)
    if router and request.shared is not None:
        request.shared.stop("a router's balance is taken over every layer")
    given, inputs = inputs, backbone_inputs(inputs)

    compiled = request.compiled
    joined = join(inputs, request.anchors) if request.anchors is not None and len(request.anchors.ids) else None
    seen = inputs if joined is None else joined.inputs  # by the student
    if compiled is not None and is_flash(implementation_of(model)):
        inputs, seen = with_boundaries(inputs), with_boundaries(seen)
    check_head_now(model, main_input(inputs).device)
    head = read_head(model)
    check_tokens(marked, main_input(inputs), head.weight.shape[0])
    needed = counted_positions(given) if request.cache is not None else None
    extra = {"output_router_logits": True} if router else {}
    passes = TwoPasses(
        model,
        request,
        inputs,
        teacher=partial(_teacher_alone, model, request),
        student=partial(run_backbone, model, {**seen, **extra}),
    )
    met = passes.met
    teacher = _teacher_pass(model, request, passes, needed, head) if lambdas.consistency else None
    if request.fill:
        return StepOutput(loss=torch.zeros((), device=main_input(inputs).device))
    targets, factors = _aligned(labels, shifted, request.task_weights)
    asked, spectrum = token_loss(request, head, teacher, factors, met), spectrum_request(request, head)
    whole = not (request.return_logits or request.measure_shares)
    if whole and compiled is not None and compiled.student is not None:
        hidden, sums, ratio, routed = compiled.student(model, {**seen, **extra}, targets, asked, spectrum)
    else:
        by_layer = nullcontext() if compiled is None or compiled.layers is None else compiled.layers.inside(model)
        with by_layer:
            outputs = passes.student()
        late = passes.late_teacher()
        if late is not None:
            teacher = _as_teacher(late, passes, partial(_teacher_head, model, request, head))
            asked = token_loss(request, head, teacher, factors, met)
        hidden, routed = outputs.last_hidden_state, outputs.get("router_logits")
        own = own_positions(hidden, targets)
        with request.part("token_terms"):
            sums = token_sums(own, targets, asked)
        with request.part("spectrum"):
            ratio = token_spectrum(own, targets, asked.head, spectrum)
    anchors = None
    if request.anchors is not None:
        with request.part("token_terms"):
            heads = (head, _teacher_head(model, request, head) if joined is not None else None)
            anchors = anchor_term(hidden, joined, request.anchors, asked.form._replace(task=PLAIN_TASK), heads)
        hidden = own_positions(hidden, targets)
    loss, task, consistency, diversity, entropy, correct, count = sums
    result: dict[str, Any] = {
        "loss": loss.clone(),  # a view of the operator's sums otherwise: FSDP2 warns that hooks on it may be lost
        "task": task,
        "consistency": consistency if lambdas.consistency else None,
        "diversity": diversity,
        "entropy": entropy,
        "correct": correct,
        "count": count,
        "anchors": anchors,
        "taught": counted_with_teacher(targets, met),
    }
    if spectrum is not None and spectrum.of == "head":
        ratio = head_spectrum(hidden, targets, asked.head, spectrum)
    if request.monitor:  # `loss` was made by the weights of what is measured
        result["loss"] = task + request.lambdas.consistency * consistency + request.lambdas.diversity * diversity
    if ratio is not None:
        result |= {"svd": ratio[0], "svd_used_k": ratio[1]}
    if teacher is not None and any(request.measures):
        with request.part("token_terms"):
            result |= of_tokens(request.measures, hidden, targets, asked, consistency)
    if request.measure_shares:
        every = max(request.teacher_factor, 1)  # a share is that of an average step
        weights = lambdas._replace(consistency=lambdas.consistency / every)
        with request.part("shares"):
            result["shares"] = shares(hidden, targets, asked, spectrum, weights, request.part)
    if router:
        result["aux_loss"] = _router_loss(model, routed, inputs.get("attention_mask") if joined is None else joined.own)
    if request.return_logits:
        result["logits"] = project(hidden.to(head.weight.device), head).to(hidden.dtype)
    if request.return_hidden:
        result["hidden"] = hidden
    return StepOutput(**result)


def _aligned(labels: Tensor | None, shifted: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Targets (B, L) of the positions that predict them, and the factors of their task loss, or None."""
    given = labels if shifted is None else shifted
    assert given is not None
    if weights is not None:
        check_task_weights(weights, given)
        weights = weights.unsqueeze(1).expand_as(given) if weights.ndim == 1 else weights
    if shifted is not None:
        return shifted, weights
    # position t predicts label t + 1
    return F.pad(given[:, 1:], (0, 1), value=IGNORED), None if weights is None else F.pad(weights[:, 1:], (0, 1))


def backbone_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The part of a causal language model's keywords that its backbone takes."""
    kept = {key: value for key, value in inputs.items() if key not in _NOT_FOR_BACKBONE and value is not None}
    return {**kept, "use_cache": False}


def _teacher_pass(
    model: PreTrainedModel, request: StepRequest, passes: TwoPasses, needed: Tensor | None, student_head: Head
) -> TeacherStates | TopLogProbs | None:
    """Final hidden states (B, L, d) of the pre-trained model, and its head; of k rows that are met (k, L, d).

    With a cache the states are rounded to bfloat16 and zero where nothing is needed, or they are the
    log-probabilities that it has instead, which need no head. None where they come with the student's, or where it
    ran for the other processes' sake.
    """
    head = partial(_teacher_head, model, request, student_head)
    if request.cache is None or needed is None:
        states = passes.teacher()
        return None if states is None else _as_teacher(states, passes, head)
    needed = needed if passes.rows is None else of_rows(needed, passes.rows)
    with request.part("teacher"):
        found = request.cache.states(passes.inputs, needed, partial(_teacher_alone, model, request), head)
    return _as_teacher(found, passes, head)


def _as_teacher(
    found: Tensor | TopLogProbs, passes: TwoPasses, head: Callable[[], Head]
) -> TeacherStates | TopLogProbs | None:
    """What the terms compare with, of what a pass or a cache gave; None where it ran for other processes' sake."""
    if isinstance(found, TopLogProbs):
        parts = [part for part in map(passes.at_met, found) if part is not None]
        return TopLogProbs(*parts) if parts else None
    own = head().alone  # reading a sharded head is collective
    states = passes.at_met(found)
    return None if states is None else TeacherStates(states, own)


def _teacher_alone(model: PreTrainedModel, request: StepRequest, inputs: dict[str, Any]) -> Tensor:
    """Final hidden states (B, L, d) of the pre-trained model, in a pass of its own."""
    forward = backbone_pass if request.compiled is None else request.compiled.teacher
    if request.teacher is not None:
        with torch.no_grad():
            return forward(request.teacher, inputs)
    with (request.switch or TeacherSwitch(model)).off():
        return forward(model, inputs)


def _teacher_head(model: PreTrainedModel, request: StepRequest, student_head: Head) -> Head:
    """The head of the pre-trained model."""
    if request.teacher_head is not None:
        return request.teacher_head
    if request.teacher is not None:
        return read_head(request.teacher)
    return read_head(model, teacher=True, student=student_head)


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
