"""The torch.compile backend `ba_lora`: graph passes for adapters, inductor underneath. Imports torch alone."""

from .backend import ba_lora
from .fallback import Compiled, or_eagerly

__all__ = ["Compiled", "ba_lora", "or_eagerly"]
