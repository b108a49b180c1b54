"""What the base model's config says before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from axolotl.loaders.constants import MULTIMODAL_AUTO_MODEL_MAPPING
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault

from ...findings import Finding
from .classification import is_classification

# ways of storing weights that no float is read from where A0 and B0 are taken; bitsandbytes' are kbit.py's
_PACKED = ("awq", "auto-round", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4")


def of_model(values: dict[str, Any]) -> Iterator[Finding]:
    """Finds what cannot be trained on the YAML's base model, by its config; nothing where that cannot be read.

    The config is read as Axolotl reads it: from a directory, the cache or the hub, with code of its own only where the
    YAML allows that.
    """
    try:
        config = load_model_config(DictDefault(values))
    except Exception:  # whatever it is, Axolotl says it in its own words when it loads the model
        return
    for check in _CHECKS:
        yield from check(values, config)


def _stored(values: dict[str, Any], config: Any) -> Iterator[Finding]:
    """Files that are quantised in a way no adapter here stands on."""
    stored = getattr(config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    name = str(getattr(method, "value", method or ""))
    if name not in _PACKED or values.get("adapter") != "ba_lora" or _made_floats(values, name):
        return
    also = "write model_quantization_config: Mxfp4Config with model_quantization_config_kwargs: {dequantize: true}, or "
    yield Finding(
        "base_model",
        values.get("base_model"),
        f"is stored as {name}, from which BA-LoRA's start is not read",
        f"{also if name == 'mxfp4' else ''}use the full-precision model (with load_in_4bit: true)",
        name != "mxfp4",  # whose values are the same as floats
    )


def _made_floats(values: dict[str, Any], method: str) -> bool:
    settings = values.get("model_quantization_config_kwargs") or {}
    return method == "mxfp4" and bool(values.get("model_quantization_config") and settings.get("dequantize"))


def _multimodal(values: dict[str, Any], config: Any) -> Iterator[Finding]:
    kind = getattr(config, "model_type", "")
    if kind in MULTIMODAL_AUTO_MODEL_MAPPING and is_classification(values):
        yield Finding(
            "base_model",
            values.get("base_model"),
            f"is a multimodal (vision-language) model ({kind}), which BA-LoRA does not train as a classifier",
            "use a text-only model",
            True,
        )


def _kind(values: dict[str, Any], config: Any) -> Iterator[Finding]:
    if getattr(config, "is_encoder_decoder", False) and not is_classification(values):
        kind = getattr(config, "model_type", "")
        yield Finding(
            "base_model",
            values.get("base_model"),
            f"is an encoder-decoder ({kind}), which BA-LoRA does not train",
            "use a causal language model",
            True,
        )


_CHECKS = (_stored, _multimodal, _kind)
