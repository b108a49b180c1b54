"""get_ba_lora_model: stock injection, then our class, then the delta form."""

from __future__ import annotations

import copy

from peft import PeftModel, get_peft_model
from torch import nn

from ..nlu.heads import DEFAULT_TARGETS, with_head
from .config import BaLoraConfig
from .delta import check_peft_version
from .model import CLASSES


def get_ba_lora_model(
    model: nn.Module,
    config: BaLoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """Wraps `model` with a BA-LoRA adapter; the base weights stay as they are, bit for bit.

    Args:
        model: The pre-trained model; modified in place, like PEFT's get_peft_model does.
        config: Copied; the caller's object is not changed.
        adapter_name: Name of the adapter.
        autocast_adapter_dtype: Keep the factors of a bfloat16 or float16 base in float32, as PEFT does.

    Returns:
        A PeftModel subclass. At step 0 it computes exactly what `model` computed.

    Raises:
        TypeError: config is not a BaLoraConfig.
        ValueError: targets that cannot be adapted (embeddings, LM head, convolutions), a rank too large, NaN weights.

    >>> import torch
    >>> base = nn.Sequential(nn.Linear(8, 8))
    >>> x = torch.ones(1, 8)
    >>> before = base(x)
    >>> model = get_ba_lora_model(base, BaLoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    >>> torch.equal(model(x), before)
    True
    """
    if not isinstance(config, BaLoraConfig):
        raise TypeError(f"config must be a BaLoraConfig, not {type(config).__name__}: use peft.get_peft_model.")
    return build(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, start=True)


def build(
    model: nn.Module,
    config: BaLoraConfig,
    adapter_name: str,
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    start: bool,
) -> PeftModel:
    """Stock injection, then our class, then the delta form. `start=False`: the factors come from a file."""
    check_peft_version()
    config = copy.deepcopy(config)
    with_head(config, model)
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = DEFAULT_TARGETS.get(getattr(getattr(model, "config", None), "model_type", ""))
    if config.target_modules is None and not config.target_parameters:
        _check_default_targets(model, config)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    stock = config.to_lora_config(init_lora_weights=False if config.delta else config.init_lora_weights)
    peft_model = get_peft_model(
        model,
        stock,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    peft_model.__class__ = CLASSES[type(peft_model)]
    try:
        peft_model._adopt(config, adapter_name, start=start)
    except Exception:
        base = peft_model.unload()  # leave the caller's model as it was
        for name, p in base.named_parameters():
            p.requires_grad_(name in trainable)
        raise
    return peft_model


def _check_default_targets(model: nn.Module, config: BaLoraConfig) -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in known:
        raise ValueError(
            f"target_modules=None and PEFT knows no default for model type {model_type!r}: write "
            "target_modules='all-linear' or a list of module names."
        )
