"""Axolotl's `quantize_moe_experts` without a CUDA device, which is where it quantises: that condition alone is gone."""

from __future__ import annotations

import inspect
from typing import Any

import bitsandbytes
from axolotl.monkeypatch import moe_quant

from balora_plugin.hosts.axolotl import experts

from .axolotl_ranks import CpuShardsPlugin

NAME = "patch_moe_quantization_on_load"
_quantise = bitsandbytes.functional.int8_vectorwise_quant


def quantise_on_any_device() -> None:
    """Takes the condition out of Axolotl's function, wherever it is called by name."""
    condition = " and param_value.is_cuda"
    source = inspect.getsource(getattr(moe_quant, NAME))
    assert source.count(condition) == 1
    exec(source.replace(condition, ""), moe_quant.__dict__)
    setattr(experts, NAME, getattr(moe_quant, NAME))
    bitsandbytes.functional.int8_vectorwise_quant = _of_any_shape


def _of_any_shape(value: Any, threshold: float = 0.0) -> Any:
    """As the kernel for CUDA takes it."""
    packed, scales, outliers = _quantise(value.reshape(-1, value.shape[-1]), threshold)
    return packed.reshape(value.shape), scales, outliers


class ShardedExpertsPlugin(CpuShardsPlugin):
    """The same on ranks under FSDP."""

    def register(self, cfg: Any) -> None:
        super().register(cfg)
        quantise_on_any_device()
