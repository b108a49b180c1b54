"""Which modules an adapter stands on: the defaults, what was injected, and what cannot be adapted."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..pretrained.classifier_head import DEFAULT_TARGETS
from .config import BaLoraConfig
from .delta import PEFT_PREFIX, is_supported_layer


def fill_default_targets(config: BaLoraConfig, model: nn.Module) -> None:
    """Gives a config without targets (in place) those of the model's type, where PEFT has no default for it.

    Raises:
        ValueError: no default is known for this model.
    """
    if config.target_modules is not None or config.target_parameters:
        return
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    config.target_modules = DEFAULT_TARGETS.get(model_type or "")
    if config.target_modules is None and model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise ValueError(
            f"target_modules=None and PEFT knows no default for model type {model_type!r}: write "
            "target_modules='all-linear' or a list of module names."
        )


def injected_layers(model: PeftModel, adapter_name: str) -> list[tuple[str, LoraLayer]]:
    """Returns (name in the base model, layer) of every layer that PEFT has given this adapter."""
    return [
        (name.removeprefix(PEFT_PREFIX), layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A)
    ]


def check_targets(base: Any, layers: list[tuple[str, LoraLayer]], custom: Collection[type[nn.Module]] = ()) -> None:
    """Refuses an adapter on the LM head, or on a kind of layer that BA-LoRA does not adapt; `custom`: the caller's own.

    Raises:
        ValueError: names the module and what to write.
    """
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for name, layer in layers:
        if layer is head or layer.get_base_layer() is head:
            raise ValueError(
                f"target_modules matches the LM head {name!r}: the terms read its weight directly and would "
                "ignore an adapter. Remove it from target_modules (or write 'all-linear', which leaves it out)."
            )
        if not (is_supported_layer(layer) or isinstance(layer, tuple(custom))):
            kept, remedy = layer.get_base_layer(), "Remove it from target_modules."
            if isinstance(kept, nn.Embedding):
                leaf = name.rpartition(".")[2]
                remedy = (
                    f"Remove it from target_modules, and write modules_to_save=[{leaf!r}] to train it whole, beside "
                    "the first copy, which the teacher keeps."
                )
            raise ValueError(
                f"target_modules matches {name!r}, a {type(kept).__name__}: BA-LoRA adapts nn.Linear, Conv1D, "
                f"bitsandbytes linear layers and fused experts. {remedy}"
            )
