"""The BA-LoRA adapter: a PEFT LoRA that starts as PiSSA without touching the base weights."""

from .build import get_ba_lora_model
from .config import BaLoraConfig

__all__ = ["BaLoraConfig", "get_ba_lora_model"]
