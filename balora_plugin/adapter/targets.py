"""Which modules an adapter stands on: the defaults, what was injected, and what cannot be adapted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..pretrained.classifier_head import DEFAULT_TARGETS, with_head
from ..pretrained.patched import check_unpatched
from .config import BaLoraConfig
from .delta import PEFT_PREFIX, is_supported_layer, refused_by_peft, split_name
from .excluding import exclude
from .peft_releases import check_experts


def fill_targets(config: BaLoraConfig, model: nn.Module) -> None:
    """Completes what a config (in place) says of its modules: a classifier's head, and defaults where it has none.

    `all-linear` means all that PEFT can adapt: what it would refuse in a model of this type is excluded.

    Raises:
        ValueError: no default is known for this model.
    """
    with_head(config, model)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        exclude(config, beyond_all_linear(model))
        return
    if config.target_modules is not None or config.target_parameters:
        return
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    config.target_modules = DEFAULT_TARGETS.get(model_type or "")
    if config.target_modules is None and model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise ValueError(
            f"target_modules=None and PEFT knows no default for model type {model_type!r}: write "
            "target_modules='all-linear' or a list of module names."
        )


def beyond_all_linear(model: nn.Module) -> list[str]:
    """Returns the last names of the linear layers that PEFT cannot adapt as layers.

    Those that it refuses in this type of model, and those whose forward gives more than a product (some routers).
    """
    odd = {name.rpartition(".")[2] for name, module in model.named_modules() if not gives_its_product(module)}
    return sorted({*refused_by_peft(model), *odd})


def gives_its_product(layer: nn.Module) -> bool:
    """Returns False for a linear layer of a class of its own whose forward makes something else of a row than a row.

    Routers that give several tensors, and products by groups of rows (DeepSeek V4).
    """
    if not isinstance(layer, nn.Linear) or not type(layer).__module__.startswith("transformers.models."):
        return True
    if type(layer).forward is nn.Linear.forward:
        return True
    meta = {
        name: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta")
        for name, p in layer.named_parameters()
    }
    row = torch.empty(1, layer.in_features, dtype=layer.weight.dtype, device="meta")
    try:
        found = torch.func.functional_call(layer, meta, row)
    except RuntimeError:
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, layer.out_features)


def injected_config(config: BaLoraConfig) -> LoraConfig:
    """Returns the stock config by which PEFT makes the layers; in delta form their factors are filled later.

    An adapter of fused experts that is loaded to be used has no dropout, which PEFT would refuse.
    """
    idle = {"lora_dropout": 0.0} if config.inference_mode and config.target_parameters else {}
    return config.to_lora_config(init_lora_weights=False if config.delta else config.init_lora_weights, **idle)


@contextmanager
def expert_dropout_explained(config: BaLoraConfig) -> Iterator[None]:
    """Says of PEFT's refusal of dropout on fused experts which key it is about, and what to write.

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    try:
        yield
    except ValueError as error:
        if "lora_dropout" not in str(error) or not config.lora_dropout:
            raise
        raise ValueError(
            f"lora_dropout={config.lora_dropout!r} with fused experts among the targets, whose inputs PEFT cannot "
            "drop: write lora_dropout=0.0, or target_modules as a list of the layers beside the experts."
        ) from None


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
    check_unpatched(base)
    check_experts(layers)
    for name, layer in layers:
        if layer is head or layer.get_base_layer() is head:
            raise ValueError(
                f"target_modules matches the LM head {name!r}: the terms read its weight directly and would "
                "ignore an adapter. Remove it from target_modules (or write 'all-linear', which leaves it out)."
            )
        if not isinstance(layer, (ParamWrapper, *custom)) and not gives_its_product(layer.get_base_layer()):
            raise ValueError(
                f"target_modules matches {name!r}, a {type(layer.get_base_layer()).__name__}, whose forward gives more "
                f"than a product: remove it, or write target_parameters=[{split_name(name)[1] + '.weight'!r}], which "
                "adapts its weight."
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
