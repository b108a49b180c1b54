"""`quantize_moe_experts`: Axolotl's 4-bit and 8-bit storage of fused experts, for `adapter: ba_lora` too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from axolotl.loaders.utils import load_model_config
from axolotl.monkeypatch.moe_quant import patch_moe_quantization_on_load
from axolotl.utils.dict import DictDefault
from torch import nn
from transformers import AutoModelForCausalLM

from ...adapter.kinds import expert_numbers
from ...findings import Finding
from ...pretrained.quantised_experts import how_experts_are_stored

KEY = "quantize_moe_experts"
_BYTES = 2  # of a number in bfloat16


def of_experts(data: dict[str, Any], block: dict[str, Any], quantised: bool) -> Iterator[Finding]:
    """Finds what contradicts quantised experts; `quantised`: whether the YAML loads its linear layers so."""
    if not data.get(KEY):
        return
    if not quantised:
        remedy = "write load_in_4bit: true or load_in_8bit: true, which says in how many bits"
        yield Finding(KEY, True, "needs a base that is quantised on loading", remedy)
    if block.get("start_from") and data.get("lora_target_parameters"):
        why = f"reads the weights of linear layers alone, not those of {KEY}: true"
        remedy = "remove it, or lora_target_parameters"
        yield Finding("ba_lora.start_from", repr(block["start_from"]), why, remedy)


def validated(data: Any, validate: Callable[[Any], Any]) -> Any:
    """Validates a YAML with the key hidden from Axolotl's own check, which knows no adapter but its own.

    Without 4-bit or 8-bit loading the key is idle.

    Raises:
        ValueError: a device that Axolotl does not quantise experts on.
    """
    if not isinstance(data, dict) or data.get("adapter") != "ba_lora" or not data.get(KEY):
        return validate(data)
    kind = str((data.get("capabilities") or {}).get("compute_capability") or "sm_")
    if not kind.startswith("sm_"):
        raise ValueError(Finding(KEY, True, f"is quantised by CUDA alone, not on {kind}", "remove it").sentence())
    config = validate({**data, KEY: False})
    config.quantize_moe_experts = bool(data.get("load_in_4bit") or data.get("load_in_8bit"))
    return config


def load_whole(cfg: Any) -> None:
    """At register: a merge's base goes to one device; planned by full-precision sizes, layers would be offloaded.

    Axolotl does so where the key is on, which merge-lora switches off.
    """
    if cfg.get("device_map") in (None, "auto") and torch.cuda.is_available():
        cfg["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}


def quantise_on_load(cfg: Any, bits: int) -> None:
    """Before a merge's base is loaded: its experts are quantised as in training, which Axolotl asks the keys for."""
    patch_moe_quantization_on_load(DictDefault({**cfg, "load_in_8bit": bits == 8}))


def check_quantised_experts(cfg: Any, model: nn.Module) -> None:
    """The loaded model has its experts quantised, where it has fused ones.

    Raises:
        ValueError: they are in full precision; names the key, their size, and what to write.
    """
    if how_experts_are_stored(model) is not None or not expert_numbers(model):
        return
    size = size_of_experts(cfg)
    raise ValueError(
        f"{KEY}: true, but the experts of {cfg.base_model} were loaded in full precision: Axolotl quantises experts "
        f"on a CUDA device alone. Load the model there, or remove the key{f' (they take {size})' if size else ''} and, "
        "where they do not fit on one device, let DeepSpeed ZeRO-3 split them "
        "(deepspeed: deepspeed_configs/zero3_bf16.json)."
    )


def size_of_experts(values: Any) -> str:
    """Returns in words what the experts of `base_model` take in bfloat16; empty where its config cannot be read."""
    try:
        config = load_model_config(DictDefault(values)).get_text_config()
        with torch.device("meta"):
            numbers = expert_numbers(AutoModelForCausalLM.from_config(config))
    except Exception:  # whatever it is, Axolotl says it in its own words when it loads the model
        return ""
    return f"{numbers * _BYTES / 1e9:.3g} GB in bfloat16"
