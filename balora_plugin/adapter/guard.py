"""Writes of stock factors over dA and dB, noticed by the layers in delta form.

PEFT's free functions (`hotswap_adapter`, `set_peft_model_state_dict`, ...) address the trained factors by a stock name,
and would leave A0, B0 of the adapter before beside the factors of another one: a third function, in silence. All of
them go through the layers' state dict, whatever the layers are wrapped in.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from torch import nn

_HOTSWAP = "peft.utils.hotswap"  # swaps values where they are, so nothing that it was given can be looked at
_native: ContextVar[bool] = ContextVar("native_factors", default=False)

REMEDY = (
    "A saved BA-LoRA adapter goes in with model.load_adapter(directory, adapter_name), another LoRA with a name of its "
    "own: model.load_adapter(directory, 'other'), model.set_adapter('other')."
)


@contextmanager
def native_factors() -> Iterator[None]:
    """Inside, dA and dB may be written without A0 and B0, which the caller restores: our own loading, and engines whose
    checkpoints hold nothing but what trains."""
    token = _native.set(True)
    try:
        yield
    finally:
        _native.reset(token)


def guard_layer(layer: nn.Module) -> None:
    """Lets a layer refuse, from now on, what would write stock factors into an adapter of its `frozen_A`."""
    layer.register_state_dict_pre_hook(_refuse_hotswap)
    layer.register_load_state_dict_pre_hook(_refuse_half)


def _refuse_hotswap(layer: Any, prefix: str, keep_vars: bool) -> None:
    """Hot-swapping asks for the state dict first, to compare names."""
    if not len(layer.frozen_A):
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == _HOTSWAP:
            swapped = frame.f_locals.get("adapter_name")
            if swapped is None or swapped in layer.frozen_A:
                raise ValueError(
                    f"hotswap_adapter would write the factors of a stock LoRA over dA and dB of the BA-LoRA adapter "
                    f"{swapped!r}, beside its A0 and B0: another function. {REMEDY}"
                )
            return
        frame = frame.f_back


def _refuse_half(layer: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """A state dict with the trained factors of an adapter in delta form, and without its frozen ones."""
    if _native.get():
        return
    for name in layer.frozen_A:
        written = [f"{prefix}{factor}.{name}.weight" for factor in ("lora_A", "lora_B")]
        frozen = [f"{prefix}{factor}.{name}.weight" for factor in ("frozen_A", "frozen_B")]
        found = [key for key in written if key in state_dict]
        if found and not all(key in state_dict for key in frozen):
            raise ValueError(
                f"the state dict holds {found[0]} without {frozen[0]}: adapter {name!r} is in delta form, where stock "
                f"factors (set_peft_model_state_dict) would be another function. {REMEDY} A state dict of this model's "
                "own factors holds the frozen ones too: model.state_dict()."
            )
