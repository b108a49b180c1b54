"""The adapter and the terms that a config asks for, as the core takes them."""

from __future__ import annotations

from typing import Any

from peft import TaskType
from transformers import PreTrainedModel

from ...adapter.config import BaLoraConfig
from ...config import RegularizerConfig
from ...pretrained.classifier_head import is_classifier
from .asked import options_of_plugins
from .block import BaLoraBlock
from .injection import target_modules


def regularizers_of(cfg: Any) -> RegularizerConfig:
    """The block's settings (all defaults if there is none)."""
    block = cfg.get("ba_lora") or {}
    return BaLoraBlock(**dict(block)).regularizers()


def adapter_config(cfg: Any, model: PreTrainedModel) -> BaLoraConfig:
    """Axolotl's `lora_*` and `peft_*` keys, and what other plug-ins ask, as a BaLoraConfig."""
    optional = {
        "r": cfg.lora_r,
        "lora_alpha": cfg.lora_alpha,
        "target_parameters": cfg.lora_target_parameters,
        "modules_to_save": cfg.lora_modules_to_save,
        "exclude_modules": cfg.lora_exclude_modules,
        "layers_to_transform": cfg.peft_layers_to_transform,
        "layers_pattern": cfg.peft_layers_pattern,
        "rank_pattern": cfg.lora_rank_pattern,
        "alpha_pattern": cfg.lora_alpha_pattern,
        "use_rslora": cfg.peft_use_rslora,
        "lora_dropout": cfg.lora_dropout,
        "fan_in_fan_out": cfg.lora_fan_in_fan_out,
    }
    start, block = cfg.peft_init_lora_weights, cfg.get("ba_lora") or {}
    given = {
        "target_modules": target_modules(cfg, model),
        "init_lora_weights": "pissa" if start is None else start,
        "task_type": TaskType.SEQ_CLS if is_classifier(model) else TaskType.CAUSAL_LM,
        "regularizers": regularizers_of(cfg),
        "compile": block.get("compile") or False,
        "start_from": block.get("start_from"),
        **{key: _plain(value) for key, value in optional.items() if value},
    }
    return BaLoraConfig(**{**given, **options_of_plugins(cfg)})


def _plain(value: Any) -> Any:
    """Axolotl's dict class is no plain dict, which PEFT writes to JSON."""
    return dict(value) if isinstance(value, dict) else value
