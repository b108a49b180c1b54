"""How much memory the experts of a YAML's model take unquantised, from its config alone."""

from __future__ import annotations

from typing import Any

import torch
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from transformers import AutoModelForCausalLM

from ...adapter.kinds import expert_numbers

_BYTES = 2  # of a number in bfloat16


def size_of_experts(values: Any) -> str:
    """Returns in words what the experts of `base_model` take in bfloat16; empty where its config cannot be read."""
    try:
        config = load_model_config(DictDefault(values)).get_text_config()
        with torch.device("meta"):
            numbers = expert_numbers(AutoModelForCausalLM.from_config(config))
    except Exception:  # whatever it is, Axolotl says it in its own words when it loads the model
        return ""
    return f"{numbers * _BYTES / 1e9:.3g} GB in bfloat16"
