"""Models whose layers another package computes in its own way, past what PEFT and the terms put into them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

# Unsloth's packages; with a layer of LoRA they read its lora_A and lora_B themselves
_UNSLOTH = ("unsloth", "unsloth_zoo", "unsloth_compiled_cache", "unsloth_compiled_module")


def check_unpatched(model: nn.Module) -> None:
    """Refuses a model that Unsloth has patched: of an adapter's layers its kernels read lora_A and lora_B alone.

    In delta form both start at zero, and A0 and B0 would be left out: nothing would train, without an error.

    Raises:
        ValueError: names the module, what of it is patched and what to load instead.
    """
    for name, module in model.named_modules():
        for attribute, function in _functions(module):
            if _package(function).startswith(_UNSLOTH):
                raise ValueError(
                    f"Unsloth has patched {name or type(model).__name__} ({attribute} is {_package(function)}."
                    f"{getattr(function, '__name__', type(function).__name__)}): its kernels read lora_A and lora_B "
                    "past PEFT's forward, without A0 and B0, and nothing would train. Load the model with transformers "
                    "(AutoModelForCausalLM) in a process that does not import unsloth."
                )


def _functions(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, function) of what computes a module: its class, its forward, and functions that were set on it."""
    yield "its class", type(module)
    yield "forward", type(module).forward
    for name, value in vars(module).items():
        if callable(value):
            yield name, value


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", None) or "")
