"""Merging an adapter into a full-precision base, and how much of the update the merged weights still hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from tqdm.auto import tqdm

from .algebra import relative
from .lora_file import Adapter, Errors, one_rank, state_dict


def attach(base: Any, adapter: Adapter) -> PeftModel:
    """Gives `base` this adapter, as unmodified PEFT has it; nothing is written to a file on the way.

    Raises:
        ValueError: the adapter does not fit the base; names a tensor.
    """
    plain = one_rank(adapter)
    model = get_peft_model(base, plain.config)
    try:
        result = set_peft_model_state_dict(model, state_dict(plain))
    except RuntimeError as error:
        raise ValueError(f"{adapter.directory!r} does not fit this base: {error}") from None
    missing = [key for key in result.missing_keys if ".lora_" in key or "modules_to_save" in key]
    odd = [*missing, *result.unexpected_keys]
    if odd:
        raise ValueError(f"{adapter.directory!r} does not fit this base: {odd[0]} is in one of them alone.")
    return model.eval()


@dataclass(frozen=True)
class Merged:
    """A merged model in float32, and what rounding its adapted weights to each dtype does to the update."""

    model: Any
    errors: dict[torch.dtype, Errors]


@torch.no_grad()
def merge(model: PeftModel, dtypes: list[torch.dtype]) -> Merged:
    """Merges the active adapter of a stock PeftModel on a float32 base, and unloads it.

    The error in a dtype is that of the update which remains in it, ||(cast(W + U) - cast(W)) - U|| / ||U||, over all
    adapted weights: rounding W itself is the base's own loss, not the update's.

    Raises:
        ValueError: an adapted weight of the base is not float32 (a quantised base swallows small updates).
    """
    lost = {dtype: {} for dtype in dtypes}  # type: dict[torch.dtype, dict[str, float]]
    norms: dict[str, float] = {}
    layers = [(name, layer) for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in tqdm(layers, desc="Measuring", disable=None, delay=2, leave=False):
        adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if not adapters:
            continue
        weight = _weight(layer)
        if weight.dtype != torch.float32:
            raise ValueError(
                f"{name} of the base is {str(weight.dtype).removeprefix('torch.')}, not float32: load the base in full "
                "precision. A quantised base swallows small updates."
            )
        update = layer.get_delta_weight(adapters[0]).float()
        norms[name] = float(update.double().norm())
        for dtype in dtypes:
            held = (weight + update).to(dtype).double() - weight.to(dtype).double()
            lost[dtype][name] = float((held - update.double()).norm())
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    errors = {}
    for dtype, by_layer in lost.items():
        total = math.sqrt(sum(error**2 for error in by_layer.values()))
        errors[dtype] = Errors(
            relative(total, whole), {name: relative(error, norms[name]) for name, error in by_layer.items()}
        )
    return Merged(model.merge_and_unload(), errors)


def _weight(layer: LoraLayer) -> Tensor:
    """Returns the weight that the layer's update is added to, in the update's orientation."""
    found: Tensor = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    return found.detach()
