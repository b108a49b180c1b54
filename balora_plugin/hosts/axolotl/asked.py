"""What is asked of the adapter beside the `lora_*` keys: by `peft:`, by other plug-ins, by kernels that read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from ...adapter.config import BaLoraConfig
from ...findings import Finding
from .superseded import expert_kernels

_STARTS = "write peft_init_lora_weights: pissa, pissa_fast or true (over a quantised base too: load_in_4bit: true)"


def peft_block(data: Any) -> Iterator[Finding]:
    """Finds what stands under `peft:`, of which nothing would reach the adapter."""
    block = data.get("peft")
    for key, value in block.items() if isinstance(block, Mapping) else ():
        value = dict(value) if isinstance(value, Mapping) else value
        if key == "loftq_config" and value:
            yield Finding(
                "peft.loftq_config", value, "is a start that BA-LoRA does not make", f"remove it, {_STARTS}", True
            )
        elif value not in (None, False, {}, []):
            remedy = "write the adapter's own key at top level (lora_..., peft_...), or remove it"
            yield Finding(f"peft.{key}", _quoted(value), "is not read by Axolotl", remedy)


def _quoted(value: Any) -> Any:
    return repr(value) if isinstance(value, str) else value


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
