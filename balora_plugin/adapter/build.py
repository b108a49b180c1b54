"""get_ba_lora_model: stock injection, then our class, then the delta form."""

from __future__ import annotations

from peft import PeftModel
from torch import nn

from .config import BaLoraConfig
from .model import build


def get_ba_lora_model(
    model: nn.Module,
    config: BaLoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Wraps `model` with a BA-LoRA adapter; the base weights stay as they are, bit for bit.

    Args:
        model: The pre-trained model; modified in place, like PEFT's get_peft_model does.
        config: Copied; the caller's object is not changed.
        adapter_name: Name of the adapter.
        autocast_adapter_dtype: Keep the factors of a bfloat16 or float16 base in float32, as PEFT does.
        low_cpu_mem_usage: Inject the adapter on the meta device, as PEFT does. PEFT leaves it empty for weights that
            are loaded afterwards; here the start fills it, with the numbers that it has without this option.

    Returns:
        A PeftModel subclass. At step 0 it computes exactly what `model` computed.

    Raises:
        TypeError: config is not a BaLoraConfig.
        ValueError: a model that torch.compile has wrapped; targets that cannot be adapted (embeddings, LM head,
            convolutions), NaN weights.

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
    if hasattr(model, "_orig_mod"):  # else PEFT says of it that it is no PreTrainedModel
        raise ValueError(
            f"model is compiled already ({type(model).__name__}), and would not be with an adapter inside: pass the "
            "model as it was before torch.compile, and compile=True in BaLoraConfig."
        )
    return build(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
        start=True,
    )
