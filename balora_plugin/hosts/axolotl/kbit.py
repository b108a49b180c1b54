"""4-bit and 8-bit loading with `adapter: ba_lora`: by Axolotl's own steps for adapter: qlora and adapter: lora.

Axolotl takes these steps for its own adapter names alone, and loads anything else unquantised without a word. Nothing
here renames the adapter in the config, where other plug-ins, telemetry and what is saved would see it.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import axolotl
from axolotl.loaders.model import ModelLoader
from axolotl.loaders.utils import load_model_config
from axolotl.utils.dict import DictDefault
from packaging.version import InvalidVersion, Version
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ...pretrained.quantised import is_quantised_linear
from . import experts
from .quantisation import LOAD_IN

logger = logging.getLogger("axolotl.balora_plugin")

TESTED_AXOLOTL = ("0.19", "0.20")  # from, below
_STEPS = ("_set_quantization_config", "_configure_embedding_dtypes")  # what Axolotl calls private; only here
_NAMES = {4: "qlora", 8: "lora"}


class _Reading(NamedTuple):
    """In how many bits a YAML loads linear layers and fused experts; None: as they are stored."""

    bits: int | None = None
    experts: int | None = None


# merge-lora reads the YAML twice, the second time with these keys off: what the first reading said, by the YAML's path
_first_reading: dict[str, _Reading] = {}


def ask_for_quantisation(cfg: Any) -> None:
    """At register, before validation: asks transformers for a quantised base, through `overrides_of_model_kwargs`.

    The settings are filled in by [`configure`], when the final precision is known. `merge-lora` too loads the base that
    was trained on, which is then made floats of: the merged model is the trained one.

    Raises:
        ValueError: a merge method that merges into another base.
    """
    path = str(cfg.get("axolotl_config_path"))
    bits = next((bits for bits, key in LOAD_IN.items() if cfg.get(key)), None)
    if cfg.get("merge_lora") and bits is None:
        bits, of_experts = _first_reading.get(path, _Reading())
        if of_experts is not None:
            experts.load_whole(cfg)
        if bits is not None:
            if cfg.get("merge_method") == "memory_efficient":
                raise ValueError(
                    f"merge_method: memory_efficient reads the full-precision base, but {LOAD_IN[bits]} trained on the "
                    f"quantised one: remove it (legacy is then taken), or pass --no-{LOAD_IN[bits].replace('_', '-')} "
                    "to merge into the full-precision base."
                )
            cfg["merge_method"] = "legacy"
    else:
        _first_reading[path] = _Reading(bits, bits if cfg.get(experts.KEY) else None)
    if bits is not None and not _stored(cfg):  # files that are quantised already say so themselves
        overrides = dict(cfg.get("overrides_of_model_kwargs") or {})
        cfg["overrides_of_model_kwargs"] = {**overrides, "quantization_config": {LOAD_IN[bits]: True}}


def bits_of(cfg: Any) -> int | None:
    """4, 8, or None for a base that is not quantised on loading."""
    settings = (cfg.get("overrides_of_model_kwargs") or {}).get("quantization_config") or {}
    return next((bits for bits, key in LOAD_IN.items() if cfg.get(key) or settings.get(key)), None)


def _stored(cfg: Any) -> dict[str, Any]:
    """How the base's own files are quantised; empty if they are not, or if there is no reading them yet."""
    try:
        model_config = load_model_config(cfg)
    except (OSError, ValueError):  # Axolotl says what is wrong with base_model when it comes to it
        return {}
    return dict(getattr(model_config, "quantization_config", None) or {})


def configure(cfg: Any, *, inference: bool) -> None:
    """At pre_model_load, with the final config: fills in the BitsAndBytesConfig that Axolotl's own adapter would get.

    In place: the loader has taken the dictionary itself from the config already.

    Raises:
        ValueError: the base is stored quantised in another way; names key, value and remedy.
    """
    bits, stored = bits_of(cfg), _stored(cfg)
    _check_stored(cfg, bits, stored)
    merged = _experts_to_merge(cfg)
    if merged is not None:
        experts.quantise_on_load(cfg, merged)
    if bits is None:
        return
    _check_version()
    if stored:
        return
    loader = _AsBuiltIn(cfg, bits, load_model_config(cfg))
    loader._set_quantization_config()
    settings = loader.model_kwargs["quantization_config"].to_dict()
    if inference:  # Axolotl then casts the whole model, and packed bytes that are stored as floats with it
        settings["bnb_4bit_quant_storage"] = "uint8"
    cfg["overrides_of_model_kwargs"]["quantization_config"].update(settings)


def prepare_base(cfg: Any, model: PreTrainedModel) -> None:
    """At pre_lora_load: Axolotl's k-bit preparation, dtypes of norms, embeddings and head included.

    Input gradients and checkpointing are left to the places that see to them for every adapter.
    """
    bits = bits_of(cfg)
    if cfg.quantize_moe_experts:
        experts.check_quantised_experts(cfg, model)
    if bits is not None:
        _AsBuiltIn(cfg, bits, model.config, model)._configure_embedding_dtypes()


def check_merged(cfg: Any, model: PreTrainedModel) -> None:
    """A base to be merged into has its experts quantised where training had.

    Raises:
        ValueError: they are in full precision; names the key and what to write.
    """
    if _experts_to_merge(cfg) is not None:
        experts.check_quantised_experts(cfg, model)


def _experts_to_merge(cfg: Any) -> int | None:
    """In how many bits training had the experts of a base that is loaded to be merged into."""
    return _first_reading.get(str(cfg.axolotl_config_path), _Reading()).experts if cfg.merge_lora else None


def check_quantised(cfg: Any, model: PeftModel, *, inference: bool) -> None:
    """The loaded base is what the YAML asked for: every adapted linear layer is quantised, and stays so.

    Raises:
        ValueError: names the layer, or what would destroy its bytes.
    """
    bits = bits_of(cfg)
    if bits is None:
        return
    kind = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    quantization = getattr(model.get_base_model().config, "quantization_config", None)
    skipped = tuple(getattr(quantization, "llm_int8_skip_modules", None) or ())
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        if is_quantised_linear(base) and type(base).__name__ == kind:
            if inference and base.weight.is_floating_point() and base.weight.dtype != cfg.torch_dtype:
                raise ValueError(
                    f"base_model: {cfg.base_model} stores its 4-bit weights as {base.weight.dtype}, which inference "
                    f"would cast to {cfg.torch_dtype}: write the precision that gives {base.weight.dtype} (bf16: true "
                    "or fp16: true), or use the full-precision model."
                )
            continue
        if isinstance(base, nn.Linear) and not any(skip in name for skip in skipped):
            raise ValueError(
                f"{LOAD_IN[bits]}: true, but {name} was loaded as {type(base).__name__}: remove what loads the model "
                "in another way (reinit_weights, type_of_model, ...), or remove it from the targets."
            )


class _AsBuiltIn(ModelLoader):
    """ModelLoader's steps alone, on a copy of the config that calls the adapter by its built-in name."""

    def __init__(self, cfg: Any, bits: int, model_config: Any, model: PreTrainedModel | None = None) -> None:
        self.cfg = DictDefault(
            {**cfg, "adapter": _NAMES[bits], **{key: n == bits for n, key in LOAD_IN.items()}},
        )
        self.cfg.gradient_checkpointing = False
        self.model_config = model_config
        self.model_kwargs: dict[str, Any] = {}
        self.model = model


def _check_version() -> None:
    missing = [name for name in _STEPS if not callable(getattr(ModelLoader, name, None))]
    if missing:
        raise ImportError(
            f"axolotl {axolotl.__version__} has no ModelLoader.{missing[0]}: 4-bit and 8-bit loading with adapter: "
            f"ba_lora needs axolotl {TESTED_AXOLOTL[0]}, or a newer balora-plugin."
        )
    try:
        version = Version(Version(axolotl.__version__).base_version)
    except InvalidVersion:  # a checkout
        return
    if not Version(TESTED_AXOLOTL[0]) <= version < Version(TESTED_AXOLOTL[1]):
        logger.warning(
            "4-bit and 8-bit loading was tested with axolotl %s to below %s, found %s.",
            *TESTED_AXOLOTL,
            axolotl.__version__,
        )


def _check_stored(cfg: Any, bits: int | None, stored: dict[str, Any]) -> None:
    """A base whose files are quantised already."""
    if not stored:
        return
    method = str(getattr(stored.get("quant_method"), "value", stored.get("quant_method")))
    theirs = next((n for n, key in LOAD_IN.items() if stored.get(key)), None) if method == "bitsandbytes" else None
    if bits is None and theirs is not None and not cfg.merge_lora:
        raise ValueError(
            f"base_model: {cfg.base_model} is stored in {theirs} bit: write {LOAD_IN[theirs]}: true, so that it is "
            "prepared for training."
        )
    if bits is None:
        return
    if theirs != bits:
        how = f"in {theirs} bit" if theirs else f"as {method}"
        raise ValueError(
            f"{LOAD_IN[bits]}: true contradicts base_model: {cfg.base_model}, which is stored {how}: use the "
            f"full-precision model{f', or write {LOAD_IN[theirs]}: true' if theirs else ''}."
        )
    if cfg.bnb_config_kwargs:
        raise ValueError(
            f"bnb_config_kwargs: {dict(cfg.bnb_config_kwargs)} cannot change base_model: {cfg.base_model}, which is "
            "stored quantised: remove it, or use the full-precision model."
        )
