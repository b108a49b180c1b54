"""What PEFT's releases do differently, in one place."""

from __future__ import annotations

import warnings
from typing import Any

import peft
from packaging.version import Version
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

TESTED_PEFT = ("0.18", "0.22")  # from, below
FUSED_EXPERTS = "0.19"  # before, PEFT took (experts, out, in) for (experts, in, out): later releases misread its files


def peft_is(least: str) -> bool:
    """Returns whether the installed PEFT is this release or a later one."""
    return Version(Version(peft.__version__).base_version) >= Version(least)


def check_peft_version() -> None:
    """Refuses a PEFT that is too old, warns once about one that the delta form was not tested with."""
    if not peft_is(TESTED_PEFT[0]):
        raise ImportError(f"BA-LoRA needs peft >= {TESTED_PEFT[0]}, found {peft.__version__}: pip install -U peft")
    if peft_is(TESTED_PEFT[1]):
        warnings.warn(
            f"balora-plugin was tested with peft {TESTED_PEFT[0]} to below {TESTED_PEFT[1]}, found {peft.__version__}.",
            stacklevel=3,
        )


def check_experts(layers: list[tuple[str, Any]]) -> None:
    """Refuses fused experts among (name, LoRA layer) where this PEFT gives their factors another meaning.

    Raises:
        ValueError: names the parameter, the release that is needed and what to write.
    """
    if peft_is(FUSED_EXPERTS):
        return
    for name, layer in layers:
        if isinstance(layer, ParamWrapper) and layer.get_param().ndim == 3:
            raise ValueError(
                f"target_parameters matches fused experts ({name}.{layer.parameter_name}), whose factors peft "
                f"{peft.__version__} lays out as no later release reads them: remove it, or install peft >= "
                f"{FUSED_EXPERTS}."
            )


def out_first(layer: ParamWrapper, ndim: int) -> bool:
    """Returns whether the parameter behind the wrapper is (..., out, in), as a linear layer's weight."""
    return ndim == 2 or getattr(layer, "_did_swap_in_out_features", False)


def add_stock_adapter(add: Any, model: PeftModel, name: str, config: LoraConfig, *, autocast: bool) -> None:
    """Calls PEFT's own add_adapter (`add`), with a later one's keyword `autocast_adapter_dtype` before 0.19 too."""
    if peft_is("0.19"):
        add(name, config, autocast_adapter_dtype=autocast)
        return
    add(name, config)
    model.base_model._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=autocast)


def as_peft_reads(config: LoraConfig, model: nn.Module) -> None:
    """Renames in a config (in place) what PEFT takes for other modules: those that were before experts were fused."""
    if peft_is("0.19"):
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        convert_peft_config_for_transformers(config, model, None)
