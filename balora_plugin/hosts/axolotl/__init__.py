"""BA-LoRA as `adapter: ba_lora` in an Axolotl YAML."""

from .plugin import BaLoraPlugin

__all__ = ["BaLoraPlugin"]
