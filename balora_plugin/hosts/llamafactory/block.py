"""The block `ba_lora:` of a LLaMA-Factory YAML: everything that is wrong in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ...anchors.reading import check_anchors
from ...config import RegularizerConfig, nearest_setting
from ...findings import Finding
from ...settings import settings_of
from .keys import MAPPED_KEYS

BLOCK = "ba_lora"
ADAPTER_KEYS = ("compile", "start_from")  # of the block, beside the terms
SHARED_NAMES = ("temperature",)  # at top level LLaMA-Factory's own, of another meaning
_TERMS = tuple(settings_of(RegularizerConfig))
_ADAPTERS = {  # what is no term, by other hosts' names of it: LLaMA-Factory's key
    "r": "lora_rank",
    "rank": "lora_rank",
    "lora_r": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_target",
    "modules_to_save": "additional_target",
    "init_lora_weights": "pissa_init",
    "use_rslora": "use_rslora",
}


def settings_under_block(data: Mapping[str, Any]) -> Any:
    """Returns what a YAML says under `ba_lora:`; an empty mapping where it says nothing, and the defaults hold."""
    block = data.get(BLOCK)
    return {} if block is None else block


def findings_of_block(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Finds a missing or misspelt block, its settings at top level, and everything that is wrong in it."""
    if BLOCK not in data:
        near = difflib.get_close_matches(BLOCK, [str(key) for key in data], n=1, cutoff=0.7)
        if near:
            yield Finding(near[0], None, "is not a key LLaMA-Factory or BA-LoRA knows", "did you mean ba_lora?")
        else:
            remedy = "write it (ba_lora: {lambda_consistency: 0.3}), or train by llamafactory-cli"
            yield Finding(BLOCK, None, "is missing, the block with the terms", remedy)
    for key in (*_TERMS, *ADAPTER_KEYS):
        if key in data and key not in SHARED_NAMES:
            yield Finding(key, data[key], "stands at top level, where nobody reads it", f"write {BLOCK}.{key}")
    block = settings_under_block(data)
    if not isinstance(block, Mapping):
        remedy = "write ba_lora: {lambda_consistency: 0.3}, or train without the terms by llamafactory-cli"
        yield Finding(BLOCK, repr(block), "must be a block of settings", remedy)
        return
    yield from _settings(block)
    yield from _compiled(data, block)
    if block.get("teacher_cache") and data.get("streaming"):
        why = "needs all documents before the first step, and streaming: true has none"
        yield Finding(f"{BLOCK}.teacher_cache", block["teacher_cache"], why, "remove one of the two")


def _settings(block: Mapping[str, Any]) -> Iterator[Finding]:
    known, good = settings_of(RegularizerConfig), {}
    if block.get("task") == "nlu":
        why = "asks for the terms of classifiers, which LLaMA-Factory does not train"
        yield Finding(f"{BLOCK}.task", "nlu", why, "remove it")
    for key, value in block.items():
        if key in ADAPTER_KEYS or (key == "task" and value == "nlu"):
            continue
        if key not in known:
            yield _unknown(str(key), value)
            continue
        try:
            checked = known[key].checked(key, value)
            known[key].check_family(key, checked, "nlg")
            if key == "anchor_data":
                check_anchors(checked, "the model's own")
            good[key] = checked
        except (ValueError, TypeError) as error:
            yield Finding.of_error(f"{BLOCK}.{error}")
    try:
        RegularizerConfig.from_dict(good).resolved("nlg")
    except (ValueError, TypeError) as error:
        yield Finding.of_error(f"{BLOCK}.{error}")


def _unknown(key: str, value: Any) -> Finding:
    own = _ADAPTERS.get(key) or (key if key.startswith("lora_") or key in MAPPED_KEYS else None)
    near = nearest_setting(key, ADAPTER_KEYS)
    if own:
        hint = f"the adapter's own keys are LLaMA-Factory's: write {own} at top level"
    else:
        hint = f"did you mean {near}?" if near else f"write some of {', '.join((*_TERMS, *ADAPTER_KEYS))}"
    return Finding(f"{BLOCK}.{key}", repr(value), "is not a setting", hint)


def _compiled(data: Mapping[str, Any], block: Mapping[str, Any]) -> Iterator[Finding]:
    compiled = block.get("compile", False)
    if not isinstance(compiled, bool) and compiled != "layers":
        yield Finding(f"{BLOCK}.compile", repr(compiled), "is not known", "write true, false or layers")
    elif compiled is True and not data.get("disable_gradient_checkpointing"):
        why = "has no effect beside LLaMA-Factory's gradient checkpointing, which no one graph can hold"
        remedy = "write layers, or disable_gradient_checkpointing: true, which takes more memory"
        yield Finding(f"{BLOCK}.compile", compiled, why, remedy, False)
