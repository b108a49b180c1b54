"""Adapters as plain data: read from a directory, ours or anybody's LoRA; changed; written as a LoRA for any server."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..adapter.config import NEUTRAL_OPTIONS
from ..adapter.delta import PEFT_PREFIX
from ..checkpoint.integrity import check_adapter
from ..checkpoint.json_file import read_object
from ..checkpoint.location import AdapterFiles
from ..checkpoint.names import CONFIG_FILE, WEIGHTS_FILE
from ..checkpoint.settings import read_settings
from .algebra import (
    by_expert,
    from_experts,
    pad_rank,
    relative,
    singular_values,
    smallest_rank,
    truncate,
    update_distance,
    update_norm,
)

_STARTS_OPTIONS = ("corda_config", "lora_ga_config", "eva_config")  # say how a start was found, not what is computed


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
    """A LoRA read from a directory; `updates` and `others` (modules_to_save ...) by their names in the file."""

    directory: str
    config: LoraConfig
    updates: dict[str, Update]
    others: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] | None = None  # ba_lora.json
    metadata: dict[str, str] = field(default_factory=dict)  # of the tensor file

    @property
    def rank(self) -> int:
        """Returns the largest rank of a layer, which is what a server has to make room for."""
        return max(update.rank for update in self.updates.values())

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of its factors."""
        return next(iter(self.updates.values())).a.dtype

    @property
    def origin(self) -> dict[str, Any] | None:
        """Returns what is recorded of its base: in ba_lora.json or, of an exported one, in the tensor file's header."""
        exported = self.metadata.get("balora")
        return self.settings or (json.loads(exported) if exported else None)


@dataclass(frozen=True)
class Errors:
    """How far an adapter's updates are from another's, relative to the latter's, Frobenius norm."""

    total: float
    by_layer: dict[str, float]

    def worst(self, count: int = 3) -> list[tuple[str, float]]:
        """Returns the layers that lose most, and their errors."""
        return sorted(self.by_layer.items(), key=lambda item: -item[1])[:count]


def read_adapter(directory: str) -> Adapter:
    """Reads a LoRA adapter, from a directory or the hub's cache; nothing is unpickled.

    Raises:
        ValueError: what is there is no LoRA, or one whose update is not scaling * B A; names the setting or the file.
    """
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
    read = _ranks(config, shapes, path)
    updates = {
        name: Update(tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], *read[name])
        for name in sorted(names)
    }
    others = {key: value for key, value in tensors.items() if key not in taken}
    return Adapter(directory, config, updates, others, settings, metadata)


def read_lora_config(files: AdapterFiles) -> tuple[LoraConfig, dict[str, Any] | None]:
    """Returns the LoraConfig of an adapter and, of one that is ours, its settings.

    Raises:
        ValueError: no adapter, no LoRA, or options whose update is not scaling * B A.
    """
    directory = files.model_id
    path = files.find(CONFIG_FILE)
    if path is None:
        checkpoints = sorted(Path(directory).glob(f"checkpoint-*/{CONFIG_FILE}"), key=lambda p: p.stat().st_mtime)
        hint = f"; its last checkpoint is {checkpoints[-1].parent}" if checkpoints else ""
        raise ValueError(f"{directory!r} holds no {CONFIG_FILE}: it is no adapter{hint}.")
    if read_object(path).get("init_lora_weights") == "loftq":  # PEFT asks for scipy
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
    for key, neutral in NEUTRAL_OPTIONS.items():
        value = getattr(config, key, neutral)
        if value not in (neutral, None, False) and key not in _STARTS_OPTIONS:
            raise ValueError(f"{key}={value!r} in {directory!r}: the update is not scaling * B A; not supported.")
    return config, read_settings(files)


def task_type_of(config: LoraConfig) -> str:
    """Returns the task type as text; of a config that names none it is taken for a causal language model's."""
    return str(getattr(config.task_type, "value", config.task_type) or "CAUSAL_LM")


def _ranks(config: LoraConfig, shapes: dict[str, tuple[int, int]], path: str) -> dict[str, tuple[float, int]]:
    """Returns (scaling, experts) of every name in the file; `shapes`: rows of A, columns of B.

    A name tells its module, but of several parameters in one module not which: there the shapes have to.

    Raises:
        ValueError: shapes that the config does not explain, or that leave a choice.
    """
    modules: dict[str, list[str]] = {}
    for name in sorted(shapes):
        modules.setdefault(name.removeprefix(PEFT_PREFIX).replace(".base_layer", ""), []).append(name)
    found: dict[str, tuple[float, int]] = {}
    for module, names in modules.items():
        keys = [f"{module}.{p}" for p in _parameters_of(config, module)] or [module]
        fits = set()
        for chosen in permutations(keys, len(names)):
            read = [_as_configured(config, key) for key in chosen]
            experts = {shapes[name][0] // rank for name, (rank, _) in zip(names, read, strict=True)}
            exact = all(shapes[n] == (r * min(experts),) * 2 for n, (r, _) in zip(names, read, strict=True))
            if len(experts) == 1 and exact and (keys != [module] or experts == {1}):
                fits.add((tuple(scaling for _, scaling in read), experts.pop()))
        if not fits:
            rows, columns = shapes[names[0]]
            raise ValueError(
                f"{path}: {names[0]} has {rows} rows in lora_A and {columns} columns in lora_B, which "
                f"{CONFIG_FILE} (r={config.r}, rank_pattern, alpha_pattern) does not explain: the two files do not "
                "belong together."
            )
        if len(fits) > 1:
            raise ValueError(
                f"alpha_pattern={config.alpha_pattern!r} gives {' and '.join(keys)} scalings of their own, and {path} "
                "does not say which factors are whose; only PEFT on a loaded base can tell: merge there, with "
                f"PeftModel.from_pretrained(<the full-precision base model>, {os.path.dirname(path)!r})"
                ".merge_and_unload(), or give both one alpha in the next training."
            )
        scalings, count = fits.pop()
        found |= {name: (scaling, count) for name, scaling in zip(names, scalings, strict=True)}
    return found


def _parameters_of(config: LoraConfig, module: str) -> list[str]:
    """Returns the names of the parameters (fused experts) that `target_parameters` finds in a module."""
    found = []
    for target in config.target_parameters or []:
        owner, _, parameter = target.rpartition(".")
        if owner and (module == owner or module.endswith(f".{owner}")):
            found.append(parameter)
    return sorted(set(found))


def _as_configured(config: LoraConfig, key: str) -> tuple[int, float]:
    """Returns the rank and the scaling that PEFT gives the module or parameter `key`."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), key), config.r)
    alpha = alphas.get(get_pattern_key(alphas.keys(), key), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


# --- one rank, one scaling


def one_rank(adapter: Adapter, rank: int | None = None, dtype: torch.dtype | None = None) -> Adapter:
    """Returns the adapter with one rank and one scaling for all layers, as servers need it.

    They read `r` and `lora_alpha` alone.

    rank None: every layer keeps its update exactly, smaller ones are filled up with zeros. Otherwise every update is
    cut to its leading `rank` directions. Scalings that differ, and rsLoRA's, go into B. `dtype`: of the tensors
    written (None: as they are).

    Raises:
        ValueError: a value that overflows in `dtype`.
    """
    target = adapter.rank if rank is None else rank
    common = next(iter(adapter.updates.values())).scaling
    keeps = rank is None and all(update.scaling == common for update in adapter.updates.values())
    keeps = keeps and common * target / target == common  # else no alpha gives the same float
    scaling = common if keeps else 1.0
    updates = {}
    for name, update in shown(adapter.updates, "Cutting" if rank is not None else "Writing"):
        a, b = update.factors()
        if rank is not None:
            a, b = truncate(a, b, rank, update.scaling)
        elif not keeps:
            b = b.double() * update.scaling
        a, b = from_experts(*pad_rank(a, b, target))
        kind = dtype or update.a.dtype
        updates[name] = Update(_cast(name, a, kind), _cast(name, b, kind), scaling, update.experts)
    others = {
        name: _cast(name, value, dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in adapter.others.items()
    }
    alpha = scaling * target
    config = deepcopy(adapter.config)
    config.r, config.lora_alpha = target, int(alpha) if alpha.is_integer() else alpha
    config.use_rslora, config.rank_pattern, config.alpha_pattern = False, {}, {}
    config.init_lora_weights, config.inference_mode = True, True
    return replace(adapter, config=config, updates=updates, others=others, settings=None, metadata={})


def smallest(adapter: Adapter, max_error: float, dtype: torch.dtype | None = None) -> tuple[Adapter, Errors]:
    """Returns the adapter at the smallest rank whose measured error, the cast included, is at most `max_error`.

    One rank for all layers: servers make room for the largest, and some ignore `rank_pattern`.

    Raises:
        ValueError: the cast alone loses more.
    """

    def at(rank: int) -> tuple[Adapter, Errors]:
        cut = one_rank(adapter, rank, dtype)
        return cut, errors(cut, adapter)

    spectra = [singular_values(*u.factors(), u.scaling) for _, u in shown(adapter.updates, "Spectra")]
    low, high = smallest_rank(spectra, max_error), adapter.rank  # what is left out decides, but for the cast
    best = at(low)
    if best[1].total <= max_error or low >= high:
        high = low
    else:
        best = at(high)
    if best[1].total > max_error:
        raise ValueError(
            f"max_error={max_error:g} cannot be met in {str(best[0].dtype).removeprefix('torch.')}: the full rank "
            f"{high} is {best[1].total:.2g} off. Write float32, or a larger error."
        )
    while high - low > 1:  # low fails, high is enough
        middle = (low + high) // 2
        tried = at(middle)
        if tried[1].total <= max_error:
            best, high = tried, middle
        else:
            low = middle
    return best


def errors(adapter: Adapter, exact: Adapter) -> Errors:
    """Measures how far `adapter` is from `exact`, from the factors alone, in float64."""
    by_layer, lost, whole = {}, 0.0, 0.0
    for name, update in shown(exact.updates, "Measuring"):
        other = adapter.updates[name]
        norm = update.norm()
        same = other.scaling == update.scaling and torch.equal(other.a, update.a) and torch.equal(other.b, update.b)
        error = 0.0 if same else other.distance(update)
        by_layer[name.removeprefix(PEFT_PREFIX)] = relative(error, norm)
        lost, whole = lost + error**2, whole + norm**2
    return Errors(relative(math.sqrt(lost), math.sqrt(whole)), by_layer)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise ValueError(f"{name} overflows in {str(dtype).removeprefix('torch.')}: use bfloat16 or float32.")
    return cast


def shown(updates: dict[str, Update], what: str) -> Iterable[tuple[str, Update]]:
    """Gives the updates by name, behind a progress bar where there is a terminal."""
    return tqdm(updates.items(), desc=what, disable=None, delay=2, leave=False)


# --- writing


def state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """Returns the tensors of the adapter's file."""
    tensors = {f"{name}.lora_A.weight": update.a for name, update in adapter.updates.items()}
    tensors |= {f"{name}.lora_B.weight": update.b for name, update in adapter.updates.items()}
    return {**tensors, **adapter.others}


def size_of(tensors: Iterable[Tensor]) -> int:
    """Returns how many bytes tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_adapter(adapter: Adapter, directory: str, metadata: dict[str, str]) -> None:
    """Writes a stock LoRA: adapter_config.json, and adapter_model.safetensors with `metadata` in its header."""
    os.makedirs(directory, exist_ok=True)
    adapter.config.save_pretrained(directory)
    save_file(state_dict(adapter), os.path.join(directory, WEIGHTS_FILE), {"format": "pt", **metadata})
