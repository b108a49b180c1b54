"""BA-LoRA as `adapter: ba_lora` in an Axolotl YAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plugin import BaLoraPlugin

__all__ = ["BaLoraPlugin"]


def __getattr__(name: str) -> Any:
    """Imports the plug-in, and Axolotl with it, where it is asked for: the commands beside it answer without."""
    if name != "BaLoraPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .plugin import BaLoraPlugin

    return BaLoraPlugin
