"""What is asked of the adapter beside the `lora_*` keys: by other plug-ins, by kernels that read it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ...adapter.config import BaLoraConfig
from ...findings import Finding
from .superseded import expert_kernels


def check_expert_kernel(data: Any, parameters: Any) -> None:
    """Refuses kernels that read lora_A and lora_B of adapted expert parameters past the layer's forward.

    The last look, at the adapter itself: where the YAML tells, [`superseded.switch_off`] has turned them off.

    Args:
        data: The final config.
        parameters: The names of the adapted parameters; empty without any.

    Raises:
        ValueError: names both settings and what to write.
    """
    lines = expert_kernels(data)
    if lines and parameters:
        key, value = lines[0]
        why = (
            f"with lora_target_parameters: {list(parameters)}: these kernels read lora_A and lora_B themselves and "
            "would leave out the frozen factors and the teacher"
        )
        remedy = "write experts_implementation: grouped_mm, or adapt no experts"
        raise ValueError(Finding(key, value, why, remedy).sentence())


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
