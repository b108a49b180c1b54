"""Adapters as plain data: read from a directory, ours or anybody's LoRA, and written as a LoRA for any server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..adapter.delta import PEFT_PREFIX
from ..adapter.options import NEUTRAL_OPTIONS
from ..checkpoint.integrity import check_adapter
from ..checkpoint.location import AdapterFiles
from ..checkpoint.lora_config import read_adapter_config
from ..checkpoint.names import CONFIG_FILE, INIT_FILE, PROBE_FILE, SETTINGS_FILE, WEIGHTS_FILE
from ..checkpoint.settings import file_digest, read_settings
from .algebra import by_expert, update_distance, update_norm
from .scalings import check_as_exported, check_as_trained, scalings_of, what_it_computes

_ORIGIN = "balora"  # in the header of an exported tensor file, which needs no side file
# they say how a start was found, or what modules_to_save shares: the update is scaling * B A all the same
_NOT_THE_UPDATE = ("corda_config", "lora_ga_config", "eva_config", "ensure_weight_tying")


@dataclass(frozen=True)
class Update:
    """One adapted matrix, or stack of experts: scaling * B A with A (E r, in), B (out, r E) in PEFT's layout."""

    a: Tensor
    b: Tensor
    scaling: float
    experts: int = 1

    @property
    def rank(self) -> int:
        """Returns the rank of the matrix, or of each expert's."""
        return self.a.shape[0] // self.experts

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns A (E, r, in), B (E, out, r)."""
        return by_expert(self.a, self.b, self.experts)

    def norm(self) -> float:
        """Returns the Frobenius norm of the update, over all experts."""
        return update_norm(*self.factors(), self.scaling)

    def distance(self, other: Update) -> float:
        """Returns the Frobenius norm of the difference of two updates."""
        return update_distance(*self.factors(), self.scaling, *other.factors(), other.scaling)


@dataclass(frozen=True)
class Adapter:
    """A LoRA read from a directory; `updates` and `others` (modules_to_save ...) by their names in the file.

    `originals`: the base's own embedding and head as they were in training, where the file holds them because tokens
    were added; by the names that they have in `others`.
    """

    directory: str
    config: LoraConfig
    updates: dict[str, Update]
    others: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] | None = None  # ba_lora.json
    metadata: dict[str, str] = field(default_factory=dict)  # of the tensor file
    originals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Returns the largest rank of a layer, which is what a server has to make room for."""
        return max(update.rank for update in self.updates.values())

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of its factors."""
        return next(iter(self.updates.values())).a.dtype

    @property
    def language(self) -> bool:
        """Returns whether it is a causal language model's, whose base can be loaded whole by its files alone."""
        return task_type_of(self.config) == "CAUSAL_LM"

    @property
    def origin(self) -> dict[str, Any] | None:
        """Returns what is recorded of its base: in ba_lora.json or, of an exported one, in the tensor file's header."""
        return self.settings or _exported(self.metadata)


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Reads a LoRA adapter, from a directory or the hub's cache; nothing is unpickled.

    Raises:
        ValueError: what is there is no LoRA, or one whose update is not scaling * B A; names the setting or the file.
    """
    directory = os.fspath(directory)
    files = AdapterFiles(directory)
    config, settings = read_lora_config(files)
    path = files.find(WEIGHTS_FILE)
    if path is None:
        pickled = " (adapter_model.bin is a pickle, which is not read: save it as safetensors with PEFT first)"
        found = files.find("adapter_model.bin") is not None
        raise ValueError(f"{directory!r} holds no {WEIGHTS_FILE}{pickled if found else ''}: nothing to export.")
    if settings is not None:
        check_adapter(settings, files)
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or save it again.") from None
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {key} holds NaN or inf: use an earlier checkpoint.")
    names = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    taken = {f"{name}.lora_{which}.weight" for name in names for which in "AB"}
    foreign = sorted(key for key in tensors if ".lora_" in key and key not in taken)
    if foreign or not names or not taken <= set(tensors):
        what = (foreign or sorted(taken - set(tensors)) or ["any lora_A"])[0]
        raise ValueError(f"{path}: {what} {'is not expected' if foreign else 'is missing'}: not an ordinary LoRA.")
    shapes = {n: (tensors[f"{n}.lora_A.weight"].shape[0], tensors[f"{n}.lora_B.weight"].shape[1]) for n in names}
    _check_config(config, settings or _exported(metadata), files, names)
    _check_targets(config, names, files)
    read = scalings_of(config, shapes, path)
    updates = {
        name: Update(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], *read[name])
        for name in sorted(names)
    }
    others, originals = _once({key: value for key, value in tensors.items() if key not in taken}, config)
    return Adapter(directory, config, updates, others, settings, metadata, originals)


def _exported(metadata: dict[str, str]) -> dict[str, Any] | None:
    """Returns what the header of an exported tensor file says; None of other files."""
    return json.loads(metadata[_ORIGIN]) if metadata.get(_ORIGIN) else None


def _check_config(config: LoraConfig, origin: dict[str, Any] | None, files: AdapterFiles, names: Iterable[str]) -> None:
    """Refuses an adapter_config.json that was edited so that it computes something else than what was saved."""
    path = files.find(CONFIG_FILE)
    if origin is None or path is None:
        return
    if "sha256" not in origin:
        check_as_exported(config, origin.get("config") or {}, path)
    elif origin["sha256"].get(CONFIG_FILE) != file_digest(path):
        check_as_trained(config, origin, names, path)


def _check_targets(config: LoraConfig, names: Iterable[str], files: AdapterFiles) -> None:
    """Refuses factors of modules that the config does not name: PEFT leaves them out, and says nothing.

    A list alone is compared: an expression, or parameters of experts, is matched with the base's own names.
    """
    targets = config.target_modules
    if config.target_parameters or isinstance(targets, str):
        return
    for name in sorted(names):
        module = name.removeprefix(PEFT_PREFIX).replace(".base_layer", "")
        if not any(module == target or module.endswith(f".{target}") for target in targets or ()):
            said = f"target_modules={sorted(targets)}" if targets else "target_modules, which is missing,"
            raise ValueError(
                f"{files.find(CONFIG_FILE)}: {said} does not name {module}, whose factors {WEIGHTS_FILE} holds: copy "
                "or save the adapter again."
            )


def _once(others: dict[str, Tensor], config: LoraConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns (each tensor once, the base's own embedding and head).

    Where tokens were added PEFT writes what modules_to_save trained twice, and the base's own beside it.
    """
    kept: dict[str, Tensor] = {}
    originals: dict[str, Tensor] = {}
    for key, value in others.items():
        if ".original_module." in key:
            originals[key.replace(".original_module.", ".")] = value
        elif ".modules_to_save." in key:
            kept.setdefault(key.replace(".modules_to_save.", "."), value)
        else:
            kept[key] = value
    trained = [f".{name}." for name in config.modules_to_save or []]  # all tensors of a module: a head has a bias
    bases = {key: value for key, value in kept.items() if not any(name in key for name in trained)}
    return kept, {**bases, **originals}


def read_lora_config(files: AdapterFiles) -> tuple[LoraConfig, dict[str, Any] | None]:
    """Returns the LoraConfig of an adapter and, of one that is ours, its settings.

    Raises:
        ValueError: no adapter, no LoRA, or options whose update is not scaling * B A.
    """
    directory = files.model_id
    path = files.find(CONFIG_FILE)
    if path is None:
        inside = sorted(Path(directory).glob(f"*/{CONFIG_FILE}"), key=lambda p: p.stat().st_mtime)
        checkpoints = [found for found in inside if found.parent.name.startswith("checkpoint-")]
        hint = f"; an adapter by its name is {inside[-1].parent}" if inside else ""  # PEFT saves "default" alone here
        hint = f"; its last checkpoint is {checkpoints[-1].parent}" if checkpoints else hint
        raise ValueError(f"{directory!r} holds no {CONFIG_FILE}: it is no adapter{hint}.")
    if read_adapter_config(path).get("init_lora_weights") == "loftq":  # PEFT asks for scipy
        raise ValueError(
            f"init_lora_weights='loftq' in {directory!r}: it replaces the base by a quantised one, to which the "
            "adapter belongs; it cannot become an adapter of the original base."
        )
    try:
        config = PeftConfig.from_pretrained(directory)
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # whatever its fields make of other types
        raise ValueError(f"{path} is not read by PEFT: {type(error).__name__}: {error}") from None
    if not isinstance(config, LoraConfig):
        raise ValueError(f"peft_type={config.peft_type.value!r} in {directory!r} is no LoRA: only LoRAs are read.")
    for key in foreign_options(vars(config)):
        value = getattr(config, key)
        raise ValueError(f"{key}={value!r} in {directory!r}: the update is not scaling * B A; not supported.")
    settings = read_settings(files)
    for name in (INIT_FILE, PROBE_FILE):
        if settings is None and files.find(name) is not None:
            raise ValueError(
                f"{directory!r} holds {name} but no {SETTINGS_FILE}, which says what its rank and alpha were: it is a "
                f"BA-LoRA adapter without all its files. Copy or save it again (or remove {name} to have it read as an "
                "ordinary LoRA, unchecked)."
            )
    return config, settings


def foreign_options(config: Mapping[str, Any]) -> list[str]:
    """Returns the options of a LoRA's config with which its update is not scaling * B A."""
    return [
        key
        for key, neutral in NEUTRAL_OPTIONS.items()
        if config.get(key) not in (neutral.value, None, False) and key not in _NOT_THE_UPDATE
    ]


def task_type_of(config: LoraConfig) -> str:
    """Returns the task type as text; of a config that names none it is taken for a causal language model's."""
    return str(getattr(config.task_type, "value", config.task_type) or "CAUSAL_LM")


# --- writing


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the tensors of the adapter's file."""
    tensors = {f"{name}.lora_A.weight": update.a for name, update in adapter.updates.items()}
    tensors |= {f"{name}.lora_B.weight": update.b for name, update in adapter.updates.items()}
    return {**tensors, **adapter.others}


def size_of(tensors: Iterable[Tensor]) -> int:
    """Returns how many bytes tensors take in a file: what shares its memory (tied weights) is written once."""
    apart = {(tensor.data_ptr(), tensor.shape, tensor.dtype): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in apart.values())


def shown(updates: dict[str, Update], what: str) -> Iterable[tuple[str, Update]]:
    """Gives the updates by name, behind a progress bar where there is a terminal."""
    return tqdm(updates.items(), desc=what, disable=None, delay=2, leave=False)


def write_adapter(adapter: Adapter, directory: str | os.PathLike[str], origin: dict[str, Any]) -> None:
    """Writes a stock LoRA: adapter_config.json, and adapter_model.safetensors with `origin` in its header.

    Beside `origin` the header says what the config computes, so that a later edit is seen.
    """
    os.makedirs(directory, exist_ok=True)
    adapter.config.save_pretrained(directory)
    header = {"format": "pt", _ORIGIN: json.dumps({**origin, "config": what_it_computes(adapter.config)})}
    save_file(state_dict(adapter), os.path.join(directory, WEIGHTS_FILE), header)
