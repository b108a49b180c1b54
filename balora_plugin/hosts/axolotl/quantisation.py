"""4-bit and 8-bit loading in a YAML, and what says how or needs it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from typing import Any

from ...findings import Finding
from .experts import of_experts

LOAD_IN = {4: "load_in_4bit", 8: "load_in_8bit"}
_FLOATS = ("float32", "bfloat16", "float16")
_BNB_OPTIONS: dict[str, tuple[Any, ...] | None] = {  # of a BitsAndBytesConfig -> what it may be, None: anything
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_compute_dtype": _FLOATS,
    "bnb_4bit_quant_storage": ("uint8", "int8", *_FLOATS),
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": None,
    "llm_int8_enable_fp32_cpu_offload": (True, False),
    "llm_int8_has_fp16_weight": (True, False),
}


def of_quantisation(data: dict[str, Any], block: dict[str, Any]) -> Iterator[Finding]:
    """Finds what contradicts quantised loading, or is idle without it; `block`: the YAML's `ba_lora:`."""
    on = [key for key in LOAD_IN.values() if data.get(key)]
    if len(on) > 1:
        why = "beside load_in_8bit: true contradict each other"
        yield Finding("load_in_4bit", True, why, "remove one of the two")
    if on and block.get("apply_to"):
        remedy = "write adapter: ba_lora, with peft_init_lora_weights: true for a plain LoRA"
        why = f"with ba_lora.apply_to: {block['apply_to']} is not supported"
        yield Finding(on[0], True, why, remedy, False)
    if on and data.get("fp8"):
        yield Finding("fp8", data["fp8"], f"beside {on[0]}: true would quantise the model twice", "remove one of them")
    given = (data.get("overrides_of_model_kwargs") or {}).get("quantization_config")
    if given and given not in [{key: True} for key in LOAD_IN.values()]:  # what the plug-in itself writes
        yield Finding(
            "overrides_of_model_kwargs.quantization_config",
            None,
            "would leave out Axolotl's preparation of quantised models",
            "write load_in_4bit: true with bnb_config_kwargs, or load_in_8bit: true",
        )
    # merge-lora switches both keys off, and a written `false` (--no-load-in-4bit) leaves the rest of the YAML idle
    idle = data.get("merge_lora") or (not on and any(data.get(key) is False for key in LOAD_IN.values()))
    options = dict(data.get("bnb_config_kwargs") or {})
    if options and not data.get("load_in_4bit") and not idle:
        why = "needs load_in_4bit: true, which alone reads it"
        yield Finding("bnb_config_kwargs", options, why, "remove it", False)
    yield from _options(options)
    yield from _start_from(data, block.get("start_from"), bool(on or idle))
    yield from of_experts(data, block, bool(on or idle))


def _options(options: dict[str, Any]) -> Iterator[Finding]:
    for key, value in options.items():
        name, shown = f"bnb_config_kwargs.{key}", repr(value)
        if key not in _BNB_OPTIONS:
            near = difflib.get_close_matches(str(key), _BNB_OPTIONS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_BNB_OPTIONS)}"
            yield Finding(name, shown, "is no option of bitsandbytes", hint)
            continue
        allowed = _BNB_OPTIONS[key]
        if allowed is not None and value not in allowed:
            yield Finding(name, shown, "is not known", f"write one of {', '.join(map(str, allowed))}")


def _start_from(data: dict[str, Any], start: Any, quantised: bool) -> Iterator[Finding]:
    if start is None:
        return
    shown = repr(start)
    if data.get("peft_init_lora_weights") is True:
        why = "with peft_init_lora_weights: true, which has no A0 and B0"
        yield Finding("ba_lora.start_from", shown, why, "remove one of the two")
    if not quantised:
        remedy = "write load_in_4bit: true, or remove it (an unquantised base starts from its own weights)"
        yield Finding("ba_lora.start_from", shown, "is for a quantised base", remedy)
    if str(start).startswith((".", "/", "~")) and not os.path.exists(start):
        remedy = "write a directory, a .safetensors file or a hub id"
        yield Finding("ba_lora.start_from", shown, "does not exist", remedy)
