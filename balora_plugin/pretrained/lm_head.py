"""How a causal language model turns final hidden states into logits, read from the model and checked against it."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..distributed import has_process_group, is_loaded, process_rank
from ..fused.head import Head
from ..fused.project import product_dtype, project
from .backbone import backbone_of, possible_backbones, run_backbone
from .quantised import dequantised, is_quantised_linear, quantised_layers_stay_in_training_mode
from .switch import TeacherSwitch

logger = logging.get_logger(__name__)
_AMPLIFIED = 1000.0
_PASSED = ("logit", "cap", "scal", "multiplier")  # in the names of what configs do to logits
_PROBED = 64  # tokens: a scale that begins at a later position than the first few is seen
_FEW = 4
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_unchecked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose parameters were not there for check_head


def read_head(model: PreTrainedModel, *, teacher: bool = False, student: Head | None = None) -> Head:
    """Reads the LM head of a causal language model; `teacher=True`: its initial copy, where the head itself trains.

    Sharded ones are gathered, quantised ones dequantised, at every call: `student`, read before, is given back where
    the teacher's is the same.

    Raises:
        ValueError: the model has no LM head, or one whose weight cannot be had as a (V, d) matrix.
    """
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(
            f"{type(model).__name__} has no LM head (get_output_embeddings() is None): BA-LoRA's NLG terms need a "
            "causal language model."
        )
    if isinstance(layer, ModulesToSaveWrapper):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save]
        layer = layer.modules_to_save[active[0]] if active and not teacher else layer.original_module
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if student is not None and weight is not None and student.sources[0] is weight:
        return student
    sources = (weight, bias)
    decoded = is_quantised_linear(layer) or hasattr(layer, "W_q") or type(weight).__module__.startswith("torchao.")
    if decoded:
        weight = _dequantised(layer)
    elif hasattr(weight, "full_tensor"):  # FSDP2, the head a unit of its own
        weight, bias = _gathered(weight), None if bias is None else _gathered(bias)
    whole = weight is not None and weight.ndim == 2 and weight.dtype in _DTYPES
    if weight is None or not (whole or hasattr(weight, "ds_id")):  # ZeRO-3 has it whole inside training alone
        found = "no weight" if weight is None else f"a weight of {weight.dtype}, shape {tuple(weight.shape)}"
        raise ValueError(
            f"the LM head ({type(layer).__name__}) has {found}, not a (vocabulary, hidden) matrix of floats. If it is "
            "quantised, leave it out (llm_int8_skip_modules=['lm_head'] and the like); if FSDP1 shards it on its own, "
            "wrap the decoder layers alone (transformer_layer_cls_to_wrap), or use fsdp_version: 2."
        )
    config = model.config.get_text_config()
    return Head(weight, bias, _logit_scale(config), _softcap(config), sources, decoded)


@torch.no_grad()
def _dequantised(layer: Any) -> Tensor:
    """Returns the weight (V, d) of a quantised head."""
    if not is_quantised_linear(layer):
        return dequantize_module_weight(layer)
    if hasattr(layer.weight, "full_tensor"):
        raise ValueError(
            "the LM head is quantised and sharded: leave it unquantised (llm_int8_skip_modules=['lm_head'])."
        )
    return dequantised(layer)


def _gathered(parameter: Any) -> Tensor:
    """Returns a DTensor whole; its gradient is the mean over the ranks, as FSDP's is."""
    from torch.distributed.tensor import Partial

    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _logit_scale(config: Any) -> float:
    """Returns the factor on the logits, which models name differently; [`check_head`] proves the reading."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:  # Granite and MiniCPM3 divide
        scaling = float(config.logits_scaling)
        return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return 1.0


def _softcap(config: Any) -> float | None:
    """Returns the cap c of c * tanh(logits / c), which models name differently; None without one."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(config, name, None):
            return float(getattr(config, name))
    return None


def head_marks(model: PreTrainedModel) -> tuple[Any, ...]:
    """Returns what the logits are made by: the head, its hooks, its own forward, the numbers in the config they pass.

    Where two of these are equal nothing has been changed that [`check_head`] would see, and it need not be run again.
    """
    head: Any = model.get_output_embeddings()
    hooks = () if head is None else (*head._forward_hooks, *head._forward_pre_hooks, vars(head).get("forward"))
    config = model.config.get_text_config().to_dict()
    numbers = {key: value for key, value in config.items() if any(part in key for part in _PASSED)}
    return id(head), hooks, numbers


def check_head(model: PreTrainedModel) -> None:
    """Runs the model on 64 tokens and compares its logits with ours, so that no architecture is silently wrong.

    Where that cannot be done yet (ZeRO-3, meta device, an 8-bit base on a CPU), [`check_head_now`] does it in the first
    forward pass.

    Raises:
        ValueError: the logits cannot be reproduced from the final hidden states.
    """
    if backbone_of(model) is model:
        raise ValueError(f"{type(model).__name__} does not separate its backbone from its LM head: not supported.")
    parameters = list(model.parameters())
    # PEFT loses the scales of an 8-bit weight on a CPU if it is dequantised for the start after a forward pass
    if any(hasattr(p, "ds_id") or (hasattr(p, "SCB") and p.device.type == "cpu") for p in parameters):
        _unchecked.add(model)
    elif is_loaded(parameters):
        _compare_logits(model, model.device)
    elif not has_process_group():
        _unchecked.add(model)
    elif process_rank() == 0:  # elsewhere rank 0 holds the weights, and has checked them
        logger.warning(
            f"BA-LoRA: {type(model).__name__} is not loaded on any rank, so it was not checked that "
            "its logits can be computed from its hidden states: load it on rank 0 (cpu_ram_efficient_loading)."
        )


def check_head_now(model: PreTrainedModel, device: torch.device) -> None:
    """Does once, inside a forward pass, what check_head had to leave; no more than a look-up where that is nothing.

    Raises:
        ValueError: the logits cannot be reproduced from the final hidden states.
    """
    if model in _unchecked:
        _unchecked.discard(model)
        _compare_logits(model, device)


@torch.no_grad()
def _compare_logits(model: PreTrainedModel, device: torch.device) -> None:
    # at rest: dropout would draw random numbers, in the first step of a resumed run too
    with TeacherSwitch(model).off(), quantised_layers_stay_in_training_mode(model):
        config = model.config.get_text_config()
        length = min(_PROBED, getattr(config, "max_position_embeddings", None) or _PROBED)
        ids = torch.arange(1, length + 1, device=device).unsqueeze(0) % config.vocab_size
        try:
            seen = _pass(model, ids, possible_backbones(model))
        except RuntimeError:  # a kernel's own limit (xLSTM's chunks of 64 in bfloat16): few tokens do not meet it
            ids = ids[:, :_FEW]
            seen = _pass(model, ids, possible_backbones(model))
        head = read_head(model, teacher=True)  # a copy that trains is off, and may have been trained before
        _check_finite(model, seen.logits)
        if seen.backbone is not backbone_of(model):  # what training runs, where the model's forward calls a part of it
            trained = run_backbone(model, {"input_ids": ids, "use_cache": False})
            seen = seen._replace(hidden=trained.last_hidden_state)
        tolerance = _Tolerance.of(seen, head)
        _check_logits(model, seen, head, tolerance)
        factor = tolerance.amplification(seen, head.scale)
        amplified = _pass(model, ids, [seen.backbone], factor)
        _check_logits(model, amplified, read_head(model, teacher=True), tolerance)


class _Pass(NamedTuple):
    """One forward pass: the module whose output the head read, that output (1, T, d), and the model's logits."""

    backbone: nn.Module
    hidden: Tensor
    logits: Tensor


def _pass(model: PreTrainedModel, ids: Tensor, backbones: list[nn.Module], factor: float = 1.0) -> _Pass:
    """Runs the model; of `backbones`, one inside the other, the head reads what the last to end returns.

    `factor`: on the hidden states that the head gets.
    """
    captured: list[tuple[nn.Module, Tensor]] = []

    def capture(module: nn.Module, args: Any, output: Any) -> None:
        if factor != 1.0:
            output.last_hidden_state = output.last_hidden_state * factor
        captured.append((module, output.last_hidden_state))

    handles = [backbone.register_forward_hook(capture) for backbone in backbones]
    try:
        output = model.forward(input_ids=ids, use_cache=False)  # past hooks: it may be inside a call of it
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"{type(model).__name__} gives no logits ({type(output).__name__}): BA-LoRA needs a causal LM "
            "(AutoModelForCausalLM) or a classifier (AutoModelForSequenceClassification)."
        )
    if not captured:
        raise ValueError(
            f"{type(model).__name__} does not call its backbone ({type(backbones[0]).__name__}) where it computes its "
            "logits: not supported."
        )
    return _Pass(*captured[-1], logits)


class _Tolerance(NamedTuple):
    """How far two evaluations of one product may be apart.

    Attributes:
        error: Of a single logit, relative to the largest.
        slope: Of the factor between all of them, which rounding hardly moves.
        largest: What the narrowest dtype on the way can hold.
    """

    error: float
    slope: float
    largest: float

    @classmethod
    def of(cls, seen: _Pass, head: Head) -> _Tolerance:
        """By the least precise dtype on the way: a head in bfloat16 may return float32, or be given it."""
        dtypes = {seen.logits.dtype, seen.hidden.dtype, head.weight.dtype, product_dtype(seen.hidden, head.weight)}
        known = [torch.finfo(dtype) for dtype in dtypes]
        eps, largest = max(info.eps for info in known), min(info.max for info in known)
        if head.dequantised:
            return cls(5e-2, 2e-2, largest)
        return cls(max(4 * eps, 1e-4), max(eps / 2, 1e-4), largest)

    def amplification(self, seen: _Pass, scale: float) -> float:
        """The factor on hidden states that makes the largest logit 1000, where any cap shows; less if too large."""
        logits, hidden = float(seen.logits.abs().max()), float(seen.hidden.abs().max())
        room = self.largest / 4
        return min(
            _AMPLIFIED / max(logits, 1e-6), room * min(abs(scale), 1.0) / max(logits, 1e-6), room / max(hidden, 1e-6)
        )


def _check_logits(model: PreTrainedModel, seen: _Pass, head: Head, tolerance: _Tolerance) -> None:
    got = project(seen.hidden.to(head.weight.device), head).to(seen.logits.device).double()
    expected = seen.logits.double()
    away = got - expected
    error = float(away.abs().max() / expected.abs().max().clamp_min(1e-6))
    slope = float((got * away).sum().abs() / got.square().sum().clamp_min(1e-12))
    if error < tolerance.error and slope < tolerance.slope:
        return
    raise ValueError(
        f"{type(model).__name__}'s logits are not softcap((hidden @ weight.T + bias) * scale) of its final hidden "
        f"states (relative error {max(error, slope):.1e}): the terms would be computed on other logits. Not supported."
    )


def _check_finite(model: PreTrainedModel, logits: Tensor) -> None:
    if bool(torch.isfinite(logits).all()):
        return
    for name, value in model.named_parameters():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{name.replace('.base_layer', '')} of the base model holds NaN or inf, and so do its logits: load "
                "a whole copy of the model, or another dtype (float16 overflows where bfloat16 does not)."
            )
