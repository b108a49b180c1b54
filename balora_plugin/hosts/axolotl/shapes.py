"""The base model that a YAML names, as shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.loaders.constants import MULTIMODAL_AUTO_MODEL_MAPPING
from axolotl.loaders.utils import load_model_config
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification

from ...memory.twin import hollow
from .classification import is_classification


def base_as_shapes(cfg: Any, dtype: torch.dtype) -> Any:
    """Returns the base model on the meta device, in the precision that Axolotl loads it in.

    Raises:
        ValueError: its config is not here.
    """
    try:
        config = load_model_config(cfg)
    except (OSError, ValueError):
        raise ValueError(
            f"base_model: {cfg.base_model} has no config here, in its directory or in the cache: download it once"
        ) from None
    auto: Any = AutoModelForSequenceClassification
    if not is_classification(cfg):
        several = config.model_type in MULTIMODAL_AUTO_MODEL_MAPPING
        auto = AutoModelForImageTextToText if several else AutoModelForCausalLM
    return hollow(lambda config: auto.from_config(config, dtype=dtype), config)


def precision_loaded(cfg: Any) -> torch.dtype:
    """Returns the precision that Axolotl loads the base in.

    bf16: auto is taken as a GPU's; where it becomes fp16, bytes are the same.
    """
    if cfg.bf16 or cfg.bfloat16 or cfg.get("bf16") is None:
        return torch.bfloat16
    return torch.float16 if cfg.fp16 or cfg.float16 else torch.float32
