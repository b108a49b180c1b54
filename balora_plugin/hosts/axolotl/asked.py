"""What is asked of the adapter beside the `lora_*` keys: by `peft:`, by other plug-ins, by kernels that read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ...adapter.config import BaLoraConfig

_STARTS = "write peft_init_lora_weights: pissa, pissa_fast or true (over a quantised base too: load_in_4bit: true)"
_EXPERT_KERNELS = ("scattermoe", "sonicmoe")
_CHOOSING = ("expert_backend", "experts_implementation", "use_scattermoe", "use_sonicmoe")


def check_peft_block(data: Any) -> None:
    """Refuses what stands under `peft:`, of which nothing would reach the adapter.

    Raises:
        ValueError: names the key, its value and what to write.
    """
    block = data.get("peft")
    for key, value in block.items() if isinstance(block, Mapping) else ():
        if key == "loftq_config" and value:
            value = dict(value) if isinstance(value, Mapping) else value
            raise ValueError(f"peft.loftq_config: {value} is a start that BA-LoRA does not make: remove it, {_STARTS}.")
        if value not in (None, False, {}, []):
            raise ValueError(
                f"peft.{key}: {value!r} is not read by Axolotl: write the adapter's own key at top level (lora_..., "
                "peft_...), or remove it."
            )


def expert_kernel(data: Any) -> str:
    """Returns the line of a YAML that chooses kernels for experts which read lora_A and lora_B; empty without one."""
    for key in _CHOOSING:
        value = data.get(key)
        if value is True or any(name in str(value) for name in _EXPERT_KERNELS):
            return f"{key}: {str(value).lower()}"
    return ""


def check_expert_kernel(data: Any, parameters: Any) -> None:
    """Refuses kernels that read lora_A and lora_B of adapted expert parameters past the layer's forward.

    Args:
        data: The YAML, written or validated.
        parameters: The names of the adapted parameters; empty without any.

    Raises:
        ValueError: names both settings and what to write.
    """
    line = expert_kernel(data)
    if line and parameters:
        raise ValueError(
            f"{line} with lora_target_parameters: {list(parameters)}: these kernels read lora_A and lora_B themselves "
            "and would leave out the frozen factors and the teacher: write experts_implementation: grouped_mm, or "
            "adapt no experts."
        )


def options_of_plugins(cfg: Any) -> dict[str, Any]:
    """Returns what other plug-ins ask of the adapter, as Axolotl asks them for its own.

    Raises:
        ValueError: names the plug-in, the option and its value, where BA-LoRA's adapter does not have it.
    """
    from axolotl.integrations.base import PluginManager

    known = {field.name for field in fields(BaLoraConfig)}
    asked: dict[str, Any] = {}
    for name, plugin in PluginManager.get_instance().plugins.items():
        options = plugin.get_lora_config_kwargs(cfg) or {}
        for key, value in options.items():
            if key not in known:
                raise ValueError(
                    f"plugins: {name} asks for an adapter with {key}={value!r}, which BA-LoRA does not have: remove "
                    "that plug-in, or its settings."
                )
        asked |= options
    if asked:
        try:
            BaLoraConfig(**asked)
        except ValueError as error:
            raise ValueError(f"plugins: another plug-in asks the adapter for {asked}: {error}") from None
    return asked
