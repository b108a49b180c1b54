"""Fused experts that bitsandbytes stores in 4 or 8 bits: a parametrization of the module, which gives floats on access.

Axolotl's `quantize_moe_experts` makes them while it loads a model. Each access dequantises the whole tensor, and no
forward pass repacks it, so these modules may go to eval mode as they like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_FOUR, _EIGHT = "Bnb4bitParametrization", "Bnb8bitParametrization"  # of bitsandbytes, of Axolotl
EXPERT = re.compile("expert", re.IGNORECASE)  # in the name of a module, or of its class


class StoredParameter(NamedTuple):
    """A parameter of a module as it is stored, and what it is on access."""

    original: Tensor
    shape: torch.Size
    dtype: torch.dtype
    how: dict[str, Any] | None  # as `base_quantization` of ba_lora.json has it; None: not quantised

    @property
    def numbers(self) -> int:
        """Returns how many numbers it holds."""
        return self.shape.numel()


def stored_parameter(module: Any, name: str) -> StoredParameter:
    """Returns a parameter without dequantising it; of one split by ZeRO-3 the whole shape."""
    for step in module.parametrizations[name] if parametrize.is_parametrized(module, name) else ():
        original: Tensor = module.parametrizations[name].original
        if type(step).__name__ == _FOUR:
            state = step.quant_state
            how = {"bits": 4, "quant_type": state.quant_type, "double_quant": bool(state.nested)}
            return StoredParameter(original, torch.Size(state.shape), state.dtype, how)
        if type(step).__name__ == _EIGHT:
            return StoredParameter(original, original.shape, step.row_stats.dtype, {"bits": 8})
    value: Tensor = getattr(module, name)
    return StoredParameter(value, torch.Size(getattr(value, "ds_shape", value.shape)), value.dtype, None)


def own_parameters(module: nn.Module) -> Iterator[tuple[str, StoredParameter]]:
    """Yields (name, parameter) of what a module holds itself, quantised or not."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    for name in [*names, *getattr(module, "parametrizations", ())]:
        yield name, stored_parameter(module, name)


def quantised_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields (name of the module, the module, name of the parameter) of every parameter that is stored quantised."""
    for where, module in model.named_modules():
        for name in getattr(module, "parametrizations", ()):
            if stored_parameter(module, name).how is not None:
                yield where, module, name


def how_experts_are_stored(model: nn.Module) -> dict[str, Any] | None:
    """Returns how a model's fused experts are quantised, as `base_quantization` of ba_lora.json has it, or None."""
    return next((stored_parameter(module, name).how for _, module, name in quantised_experts(model)), None)


def quantise_experts(model: nn.Module, how: dict[str, Any]) -> None:
    """Quantises the fused experts of a loaded model in place, as [`how_experts_are_stored`] has recorded it."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for where, module in list(model.named_modules()):
        if not EXPERT.search(where):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim < 3:
                continue
            if how["bits"] == 8:
                _replace_8bit(module, name, parameter)
            else:
                replace_parameter_4bit(
                    module, name, compress_statistics=how["double_quant"], quant_type=how["quant_type"]
                )


def dequantise_experts(model: nn.Module) -> None:
    """Puts plain parameters, what the experts compute with, in the place of quantised ones."""
    for _, module, name in list(quantised_experts(model)):
        value = getattr(module, name).detach()
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        setattr(module, name, nn.Parameter(value, requires_grad=False))


@contextmanager
def left_out_of_state_dicts(model: nn.Module) -> Iterator[None]:
    """Keeps quantised experts out of a model's state dict inside the block.

    bitsandbytes names 4-bit ones, and their scales, by what no module has as a tensor.
    """
    holders = {id(module): module for _, module, _ in quantised_experts(model)}
    hooks = [module.register_state_dict_post_hook(_without_quantised) for module in holders.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without_quantised(module: Any, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in module.parametrizations:
        stored = (f"{prefix}{name}", f"{prefix}parametrizations.{name}")
        for key in [key for key in state_dict if key in stored or key.startswith(tuple(f"{one}." for one in stored))]:
            del state_dict[key]


def forget_cached(module: nn.Module, name: str) -> None:
    """Drops what torch's cache of parametrized values holds of a parameter whose parametrizations have changed.

    Adding one reads the parameter, which puts the value of before into the cache where a module around opened it: an
    adapter would be left out without a word, and its factors get no gradient.
    """
    parametrize._cache.pop((id(module), name), None)


class Bnb8bitParametrization(nn.Module):
    """int8 with a scale a row, by the names that Axolotl's parametrization of 8-bit experts gives its tensors."""

    row_stats: Tensor

    def __init__(self, row_stats: Tensor) -> None:
        super().__init__()
        self.register_buffer("row_stats", row_stats)

    @torch.no_grad()
    def forward(self, quantised: Tensor) -> Tensor:
        """Returns int8 (..., in) as float32."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        rows = quantised.reshape(-1, quantised.shape[-1])
        return int8_vectorwise_dequant(rows, self.row_stats).reshape(quantised.shape)


def _replace_8bit(module: nn.Module, name: str, parameter: Tensor) -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    rows = parameter.data.to(torch.float16).reshape(-1, parameter.shape[-1])
    quantised, row_stats, _ = int8_vectorwise_quant(rows)
    setattr(module, name, nn.Parameter(quantised.reshape(parameter.shape), requires_grad=False))
    parametrize.register_parametrization(module, name, Bnb8bitParametrization(row_stats), unsafe=True)
