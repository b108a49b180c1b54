"""The BA-LoRA adapter: a PEFT LoRA that starts as PiSSA without touching the base weights."""

from .config import BaLoraConfig
from .model import get_ba_lora_model

__all__ = ["BaLoraConfig", "get_ba_lora_model"]
