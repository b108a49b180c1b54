"""How a causal language model turns final hidden states into logits, read from the model and checked against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel

from .fused import HeadFactor
from .fused.project import project
from .quantised import quantised_layers_stay_in_training_mode


@dataclass(frozen=True)
class Head:
    """logits = softcap((hidden @ weight.T + bias) * scale); weight (V, d), bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None
    source: Any = None  # the parameter `weight` is, or was gathered from

    @property
    def trains(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


def read_head(model: PreTrainedModel, *, teacher: bool = False) -> Head:
    """The LM head of a causal language model; `teacher=True`: its initial copy, where the head itself trains.

    Raises:
        ValueError: the model has no LM head.
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
    source = weight = layer.weight
    bias = getattr(layer, "bias", None)
    if hasattr(weight, "full_tensor"):  # sharded (FSDP2)
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    config = model.config.get_text_config()
    return Head(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None), source)


def _logit_scale(config: Any) -> float:
    """Models name the factor on their logits differently; [`check_head`] proves the reading."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:  # Granite and MiniCPM3 divide
        scaling = float(config.logits_scaling)
        return scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return 1.0


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Runs the model on four tokens and compares its logits with ours, so that no architecture is silently wrong.

    Raises:
        ValueError: the logits cannot be reproduced from the final hidden states.
    """
    backbone = model.base_model
    if backbone is model or any(p.device.type == "meta" for p in model.parameters()):
        if backbone is model:
            raise ValueError(f"{type(model).__name__} does not separate its backbone from its LM head: not supported.")
        return
    if any(hasattr(p, "ds_id") for p in model.parameters()):  # ZeRO-3: parameters are gathered inside training only
        return
    captured: list[Tensor] = []
    handle = backbone.register_forward_hook(lambda module, args, output: captured.append(output.last_hidden_state))
    try:
        with quantised_layers_stay_in_training_mode(model):
            ids = torch.arange(1, 5, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
            expected = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    head = read_head(model)
    got = project(captured[0].to(head.weight.device), head.weight, head.bias, head.scale, head.softcap)
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    error = (got.to(expected.device) - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not error < tolerance:
        raise ValueError(
            f"{type(model).__name__}'s logits are not softcap((hidden @ weight.T + bias) * scale) of its final hidden "
            f"states (relative error {error:.1e}): the terms would be computed on other logits. Not supported."
        )


class FactorCache:
    """The head's spectral factor, computed once and again only when the head changed."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._factor: HeadFactor | None = None

    def get(self, head: Head) -> HeadFactor:
        # not the address of the data: a gathered (sharded) weight has another one at every step
        key = (id(head.source), head.source._version, tuple(head.weight.shape), head.weight.device)
        if self._factor is None or key != self._key:
            self._factor, self._key = HeadFactor.from_weight(head.weight.detach(), head.bias), key
        return self._factor
