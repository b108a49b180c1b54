"""What a YAML's training step holds, counted from the base model's config: no weights, no data, no GPU."""

from __future__ import annotations

import math
from typing import Any

import torch
from axolotl.utils.dict import DictDefault

from ...adapter.config import BaLoraConfig
from ...config import RegularizerConfig
from ...memory.estimate import Workload
from ...memory.remedies import Case
from ...memory.twin import Twin
from ...training.checks.model import resolve
from .adapter import adapter_config, regularizers_of
from .block import ADAPTER, of_block
from .checks import active
from .classification import is_classification
from .method import spelled_out
from .quantisation import LOAD_IN
from .shapes import base_as_shapes, precision_loaded

_OPTIMIZER = "adamw_torch_fused"  # what Axolotl takes where nothing is said
_LENGTH = 512
_WITHOUT = RegularizerConfig(lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0)


def case_of(values: dict[str, Any]) -> Case:
    """Returns the run that a YAML, as it was written, asks for, on one GPU.

    Raises:
        ValueError: the model's config is not here, its model cannot be made of shapes alone, or a setting of the block
            has no such value.
    """
    wrong = list(of_block(values.get("ba_lora"), "nlu" if is_classification(values) else "nlg"))
    if wrong:
        raise ValueError(str(wrong[0]))
    cfg = DictDefault(spelled_out(values))
    dtype = precision_loaded(cfg)
    base = base_as_shapes(cfg, dtype)
    adapter = _adapter(cfg, base)
    twin = Twin(base, adapter)
    bits = None if adapter is None else next((bits for bits, key in LOAD_IN.items() if cfg.get(key)), None)
    terms = resolve(base, regularizers_of(cfg) if active(cfg) else _WITHOUT, adapter_follows=True)
    optimizer = str(cfg.optimizer or _OPTIMIZER)
    rows = int(cfg.micro_batch_size or 1)
    anchors = 0 if terms.anchor_data is None else math.ceil(terms.anchor_fraction * rows)  # at most, as long as others
    work = Workload(
        rows=rows + anchors,
        length=int(cfg.sequence_len or _LENGTH),
        terms=terms,
        cached=terms.teacher_cache is not None,
        checkpointing=bool(cfg.gradient_checkpointing),
        accumulates=int(cfg.gradient_accumulation_steps or 1) > 1,
        optimizer=optimizer,
        autocast=None if dtype == torch.float32 else dtype,
    )
    return Case(twin, work, twin.held(optimizer, bits), bits, adapts=adapter is not None)


def _adapter(cfg: Any, base: Any) -> BaLoraConfig | None:
    """The adapter that the YAML asks for; another one than ours is counted as a plain LoRA of its rank."""
    if not cfg.adapter:
        return None
    return adapter_config(cfg if cfg.adapter == ADAPTER else cfg | {"peft_init_lora_weights": True}, base)
