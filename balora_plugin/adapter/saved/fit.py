"""Whether a saved adapter is of the kind that the adapter here is: the same layers, scalings and trained modules.

PEFT loads what fits by its name and shape, and takes the scaling of the model's own config: of another kind it would
make a third function, in silence.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open

from ...checkpoint.location import AdapterFiles
from ...checkpoint.lora_config import read_adapter_config
from ...checkpoint.names import CONFIG_FILE, WEIGHTS_FILE
from ..delta import PEFT_PREFIX, target_key, unwrapped_name
from ..targets import injected_layers
from .stock import rank_and_scaling

_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def check_scalings(model: PeftModel, adapter_name: str, saved: dict[str, Any], source: str) -> None:
    """Refuses an adapter whose layers had other ranks or scalings; `saved`: its config's fields, those it has.

    Raises:
        ValueError: names the setting, both values and the remedy.
    """
    fields = {key: saved[key] for key in _SCALING if saved.get(key) is not None}
    config, here = LoraConfig(**fields), model.peft_config[adapter_name]
    for name, layer in injected_layers(model, adapter_name):
        module = target_key(unwrapped_name(name), layer)
        rank, scaling = rank_and_scaling(config, module)
        if rank == layer.r[adapter_name] and math.isclose(scaling, layer.scaling[adapter_name], rel_tol=1e-7):
            continue
        key = next((key for key in _SCALING if getattr(config, key) != getattr(here, key)), "r")
        raise ValueError(
            f"{key}={getattr(here, key)!r} here, but the adapter in {source!r} has {key}={getattr(config, key)!r}, "
            f"another value for {module}: write {getattr(config, key)!r}."
        )


def check_tensors(
    model: PeftModel, adapter_name: str, keys: Iterable[str], modules: list[str] | str | None, source: str
) -> None:
    """Refuses a file of other layers or trained modules; `keys`: its tensors, `modules`: its modules_to_save.

    Where the vocabulary grew PEFT writes embedding and head of the base as well, and the trained ones twice.

    Raises:
        ValueError: names a tensor and what to write.
    """
    found = {key.replace(".modules_to_save.", ".") for key in keys if ".original_module." not in key}
    expected = _tensors(model, adapter_name)
    here = sorted(getattr(model.peft_config[adapter_name], "modules_to_save", None) or [])
    saved = [modules] if isinstance(modules, str) else sorted(modules or [])
    foreign = {key for key in found - expected if ".lora_" in key or _is_of(key, saved)}
    missing = expected - found
    if not missing and not foreign:
        return
    first = min(missing or foreign)
    what = f"{first}: it was saved for other target modules or another model"
    if not missing:
        what = f"{first}, which this model's config does not target: load it with its own config"
    if ".lora_" not in first:
        what = f"{first}: modules_to_save={here or None!r} here, but it was saved with {saved or None!r}: write that"
    raise ValueError(f"the adapter in {source!r} {'lacks' if missing else 'also holds'} {what}.")


def check_stock_fits(model: PeftModel, adapter_name: str, files: AdapterFiles) -> None:
    """Refuses to load an adapter from stock files, which are not in delta form, over one of another kind.

    What is no LoRA, or has no safetensors file, is not looked at: PEFT reads it.

    Raises:
        ValueError: names the setting or the tensor, and what to write.
    """
    config, weights = files.find(CONFIG_FILE), files.find(WEIGHTS_FILE)
    if not isinstance(model.peft_config.get(adapter_name), LoraConfig) or config is None or weights is None:
        return
    saved = read_adapter_config(config)
    if saved.get("peft_type") != "LORA":
        return
    check_scalings(model, adapter_name, saved, str(files))
    with safe_open(weights, framework="pt") as file:
        check_tensors(model, adapter_name, file.keys(), saved.get("modules_to_save"), str(files))


def check_checkpoint_fits(model: Any, directory: str, ours: list[str]) -> None:
    """Refuses to resume a checkpoint whose other adapters than `ours`, which are looked at as they load, do not fit.

    Raises:
        ValueError: as [`check_stock_fits`].
    """
    for name in getattr(model, "peft_config", None) or {}:
        where = os.path.join(directory, name)
        if name not in ours:
            check_stock_fits(model, name, AdapterFiles(where if os.path.isdir(where) else directory))


def _tensors(model: PeftModel, adapter_name: str) -> set[str]:
    """Returns the names of an adapter's tensors in a file of PEFT's: factors, and what modules_to_save trains."""
    expected = set()
    for name, layer in injected_layers(model, adapter_name):
        plain = name.removeprefix(PEFT_PREFIX)
        kinds = ("lora_A", "lora_B") if adapter_name in layer.lora_A else ("lora_embedding_A", "lora_embedding_B")
        suffix = ".weight" if kinds[0] == "lora_A" else ""
        expected |= {f"{PEFT_PREFIX}{unwrapped_name(plain)}.{kind}{suffix}" for kind in kinds}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            own = module.modules_to_save[adapter_name].named_parameters()
            # one flat parameter of FSDP's tells no names
            expected |= {f"{unwrapped_name(name)}.{unwrapped_name(key)}" for key, _ in own if "_flat_param" not in key}
    return expected


def _is_of(key: str, modules: list[str]) -> bool:
    """Returns whether a tensor is of one of these modules, which are named by the end of their names."""
    return any(f".{module}." in key for module in modules)
