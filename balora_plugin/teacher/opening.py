"""Opening a teacher cache for one teacher: what in it and around it changes its outputs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..config import RegularizerConfig
from ..pretrained.fingerprint import model_fingerprint, tokenizer_fingerprint
from ..pretrained.lm_head import read_head
from .cache import TeacherCache
from .in_memory import MemoryFiles
from .rows import RowChoice


def open_cache(
    directory: str | MemoryFiles,
    teacher: PreTrainedModel,
    config: RegularizerConfig,
    *,
    own: bool,
    tokenizer: Any = None,
    mixed_precision: str = "no",
    base: str | None = None,
) -> TeacherCache:
    """Opens the cache in `directory` for this teacher, before it is sharded; `own`: a second model, with its adapters.

    `base`: the teacher's fingerprint, where it is known already.

    Raises:
        ValueError: the directory holds another teacher's cache, or one that does not serve these (resolved) terms.
    """
    dtype = str(teacher.dtype).removeprefix("torch.")
    weight = read_head(teacher).weight
    vocabulary, hidden_size = map(int, getattr(weight, "ds_shape", weight.shape))
    return TeacherCache(
        directory,
        RowChoice(
            hidden_size,
            vocabulary,
            top_k=config.teacher_cache_top_k,
            temperature=config.temperature or 1.0,
            form=config.consistency or "kl",
        ),
        base=base or model_fingerprint(teacher, with_adapters=own),
        tokenizer=tokenizer_fingerprint(tokenizer),
        precision=", ".join([dtype, *_computing(teacher, mixed_precision)]),
        attention=str(getattr(teacher.config, "_attn_implementation", "") or ""),
        rope_limit=_rope_limit(teacher.config.get_text_config()),
    )


def _computing(teacher: PreTrainedModel, mixed_precision: str) -> list[str]:
    """Returns what changes a teacher's states beside its weights."""
    found = [] if mixed_precision == "no" else [f"{mixed_precision} autocast"]
    quantisation = getattr(teacher.config, "quantization_config", None)
    values = quantisation if isinstance(quantisation, dict) else getattr(quantisation, "__dict__", {})
    if values.get("load_in_4bit", values.get("_load_in_4bit")):
        found.append(f"4-bit weights in {str(values.get('bnb_4bit_compute_dtype')).removeprefix('torch.')}")
    if values.get("load_in_8bit", values.get("_load_in_8bit")):
        found.append(f"int8 with outliers from {values.get('llm_int8_threshold')}")
    return found


def _rope_limit(config: Any) -> int | None:
    """Returns up to where rotary frequencies that follow a batch's longest row are their usual ones; None: always."""
    parameters = getattr(config, "rope_parameters", None) or {}
    groups = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [
        int(group.get("original_max_position_embeddings") or config.max_position_embeddings)
        for group in groups
        if "dynamic" in str(group.get("rope_type")) or group.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)
