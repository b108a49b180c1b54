"""Merging an adapter into a base in float32, how much of the update the merged weights still hold, and saving them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from .algebra import relative
from .reduced import Errors


@dataclass(frozen=True)
class Merged:
    """A merged model in float32, and what rounding its adapted weights to a dtype does to the update."""

    model: Any
    errors: Errors


@torch.no_grad()
def merge(model: PeftModel, dtype: torch.dtype) -> Merged:
    """Merges the active adapter of a stock PeftModel on a float32 base, and unloads it.

    The error in `dtype` is that of the update which remains in it, ||(cast(W + U) - cast(W)) - U|| / ||U||, over all
    adapted weights: rounding W itself is the base's own loss, not the update's.

    Raises:
        ValueError: an adapted weight of the base is not float32 (a quantised base swallows small updates).
    """
    lost: dict[str, float] = {}
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
        held = (weight + update).to(dtype).double() - weight.to(dtype).double()
        lost[name] = float((held - update.double()).norm())
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    total = math.sqrt(sum(error**2 for error in lost.values()))
    errors = Errors(relative(total, whole), {name: relative(error, norms[name]) for name, error in lost.items()})
    merged = model.merge_and_unload()
    _untie(merged)
    return Merged(merged, errors)


def _untie(model: Any) -> None:
    """Lets the config say that embedding and head are two, where one of a tied pair was trained: PEFT 0.18 does not."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if None in ends or ends[0].weight is ends[1].weight:
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def save(model: Any, directory: str | os.PathLike[str]) -> None:
    """Writes a merged model, with the base's settings of generation as they stand: they are none of ours to correct.

    transformers loads settings that contradict each other (a temperature without sampling) and does not save them.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        model.save_pretrained(directory)
        return
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(directory)
    finally:
        model.generation_config = settings
    settings.to_json_file(os.path.join(directory, GENERATION_CONFIG_NAME))


def _weight(layer: LoraLayer) -> Tensor:
    """Returns the weight that the layer's update is added to, in the update's orientation."""
    found: Tensor = layer.get_param() if hasattr(layer, "get_param") else layer.get_base_layer().weight
    return found.detach()
