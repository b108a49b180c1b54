"""BA-LoRA: bias-alleviating low-rank adaptation for TRL, transformers, Axolotl and LLaMA-Factory."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

# Lazy: importing the package imports no host, and nothing at all before an attribute is used.
_LAZY = {
    "RegularizerConfig": ".config",
    "BaLoraConfig": ".adapter.config",
    "get_ba_lora_model": ".adapter.build",
    "BaLoraModel": ".adapter.model",
    "BaLoraTrainerMixin": ".training.trainer",
    "BaLoraTrainer": ".hosts.transformers",
    "BaLoraSFTTrainer": ".hosts.trl",
    "BaLoraPlugin": ".hosts.axolotl",
}
_NEEDS = {"BaLoraSFTTrainer": "trl", "BaLoraPlugin": "axolotl"}
# what `from balora_plugin import *` can give here
__all__ = ["__version__", *(name for name in _LAZY if name not in _NEEDS or find_spec(_NEEDS[name]) is not None)]

if TYPE_CHECKING:
    from .adapter.build import get_ba_lora_model as get_ba_lora_model
    from .adapter.config import BaLoraConfig as BaLoraConfig
    from .adapter.model import BaLoraModel as BaLoraModel
    from .config import RegularizerConfig as RegularizerConfig
    from .hosts.transformers import BaLoraTrainer as BaLoraTrainer
    from .hosts.trl import BaLoraSFTTrainer as BaLoraSFTTrainer
    from .training.trainer import BaLoraTrainerMixin as BaLoraTrainerMixin


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
