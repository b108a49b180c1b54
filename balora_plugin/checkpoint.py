"""Format version 1: what a saved BA-LoRA adapter is, how it is written and read back exactly.

A directory holds a stock LoRA of rank 2r for the original base (adapter_config.json, adapter_model.safetensors, with
A = [dA; A0 + dA] and B = [B0, dB]) and side files: ba_lora_init.safetensors (A0; dA, dB and B0 stand exactly in the
stock file), for a classifier ba_lora_head.safetensors (the teacher's head), and ba_lora.json (format version, settings,
hashes), written last. Unmodified PEFT reads the first two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import torch.distributed as dist
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import provenance
from .adapter.delta import FROZEN, PEFT_PREFIX, delta_layers_of, num_experts, split_factors, stack_factors, target_key
from .cache_files import HEADER
from .nlu.heads import HEAD_FILE, write_head

if TYPE_CHECKING:
    from .adapter.config import BaLoraConfig

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
SETTINGS_FILE = "ba_lora.json"
INIT_FILE = "ba_lora_init.safetensors"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def stock_config(config: BaLoraConfig, model: PeftModel | None = None, adapter_name: str = "default") -> LoraConfig:
    """The LoraConfig of the saved file: rank 2r with the same scaling in delta form, rank r otherwise.

    alpha / r = (2 alpha) / (2 r) exactly. With rsLoRA alpha / sqrt(r) has no such twin, so the saved file says
    use_rslora=False with an alpha that gives the same float. Patterns are written per layer where their own form, read
    back by PEFT, would give a layer something else (rsLoRA; overlapping patterns, whose order the file loses). `model`
    is needed to know the layers: without it (a config saved before training) patterns stay as they are, doubled.
    """
    if not config.delta:
        return config.to_lora_config(init_lora_weights=True)
    ranks: dict[str, int] = config.rank_pattern or {}
    alphas: dict[str, float] = config.alpha_pattern or {}
    default_rank: int = config.r
    default_alpha: float = config.lora_alpha
    rslora: bool = config.use_rslora
    doubled = {key: 2 * rank for key, rank in ranks.items()}
    if rslora:
        alpha = _alpha_for(default_alpha / math.sqrt(default_rank), 2 * default_rank)
        scaled = {
            key: _alpha_for(
                alphas.get(key, default_alpha) / math.sqrt(ranks.get(key, default_rank)),
                2 * ranks.get(key, default_rank),
            )
            for key in {**ranks, **alphas}
        }
    else:
        alpha, scaled = 2 * default_alpha, {key: 2 * value for key, value in alphas.items()}
    changes: dict[str, Any] = {"init_lora_weights": True, "use_rslora": False, "r": 2 * default_rank}
    stock = config.to_lora_config(**changes, lora_alpha=alpha, rank_pattern=doubled, alpha_pattern=scaled)
    if model is None or not (ranks or alphas):
        return stock
    layers = [(target_key(name, layer), layer) for name, layer in delta_layers_of(model, adapter_name)]
    if all(_as_peft_reads(stock, key) == (2 * la.r[adapter_name], la.scaling[adapter_name]) for key, la in layers):
        return stock
    stock.rank_pattern = {key: 2 * layer.r[adapter_name] for key, layer in layers}
    stock.alpha_pattern = {
        key: _alpha_for(layer.scaling[adapter_name], 2 * layer.r[adapter_name]) for key, layer in layers
    }
    return stock


def _as_peft_reads(config: LoraConfig, key: str) -> tuple[int, float]:
    """Rank and scaling PEFT gives the module `key` when it reads `config` back from its file, where keys are sorted."""
    rank_key = get_pattern_key(sorted(config.rank_pattern), key)
    alpha_key = get_pattern_key(sorted(config.alpha_pattern), key)
    rank = config.rank_pattern.get(rank_key, config.r)
    return rank, config.alpha_pattern.get(alpha_key, config.lora_alpha) / rank


def _alpha_for(scaling: float, rank: int) -> float:
    """alpha with alpha / rank == scaling, bit for bit (or, if no float does, to the last bit of a float32)."""
    guess = scaling * rank
    for alpha in (guess, math.nextafter(guess, math.inf), math.nextafter(guess, 0.0)):
        if alpha / rank == scaling:
            return alpha
    return guess


def delta_layers(model: PeftModel, adapter_name: str) -> list[tuple[str, LoraLayer]]:
    """(name as it stands in state dicts, layer) of every layer with `adapter_name` in delta form."""
    return [(PEFT_PREFIX + name, layer) for name, layer in delta_layers_of(model, adapter_name)]


def to_stock_state_dict(model: PeftModel, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` of the whole model with this adapter's tensors replaced by the stock rank-2r pair.

    A dict gathered by a sharded trainer may lack the frozen factors: they are completed from the model if it holds them
    whole. Refused, never half-written: a dict without the trained factors, or tensors of another shape.

    Raises:
        ValueError: names the tensor that is missing or of another shape.
        FloatingPointError: a factor holds NaN or inf.
    """
    stock = {key: value for key, value in state_dict.items() if not any(f".{name}." in key for name in FROZEN)}
    for name, layer in delta_layers(model, adapter_name):
        tensors = {}
        for attribute in ("lora_A", "lora_B", *FROZEN):
            key = f"{name}.{attribute}.{adapter_name}.weight"
            module = getattr(layer, attribute)[adapter_name]
            value = state_dict.get(key)
            if value is None and attribute in FROZEN:
                value = module.weight.detach()
            expected = (module.out_features, module.in_features)
            if value is None or tuple(value.shape) != expected:
                raise ValueError(
                    f"cannot save BA-LoRA adapter {adapter_name!r}: {key} is "
                    f"{'missing from' if value is None else f'{tuple(value.shape)}, not {expected}, in'} the state "
                    "dict. Gather the full state dict first (FSDP: FULL_STATE_DICT; ZeRO-3: "
                    "stage3_gather_16bit_weights_on_model_save)."
                )
            tensors[attribute] = value.detach()
            if not bool(torch.isfinite(value).all()):
                raise FloatingPointError(
                    f"cannot save BA-LoRA adapter {adapter_name!r}: {key} holds NaN or inf. Nothing was written: go on "
                    "from the last checkpoint, with a lower learning_rate."
                )
        a, b = stack_factors(
            tensors["lora_A"], tensors["lora_B"], tensors["frozen_A"], tensors["frozen_B"], num_experts(layer)
        )
        stock[f"{name}.lora_A.{adapter_name}.weight"] = a
        stock[f"{name}.lora_B.{adapter_name}.weight"] = b
    return stock


def init_state_dict(model: PeftModel, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A0 of every layer, `<layer>.lora_A0.weight` -> (r, in), on the CPU."""
    return {
        f"{name}.lora_A0.weight": state_dict.get(
            f"{name}.frozen_A.{adapter_name}.weight", layer.frozen_A[adapter_name].weight
        )
        .detach()
        .cpu()
        .contiguous()
        for name, layer in delta_layers(model, adapter_name)
    }


def write_side_files(directory: str, model: PeftModel, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Checks the stock file that was just written, then adds A0 and, last, the settings with the files' hashes."""
    config = model.peft_config[adapter_name]
    names = [CONFIG_FILE, WEIGHTS_FILE]
    if config.delta:
        check_stock_file(directory, model, adapter_name)
        write_init_file(directory, model, adapter_name, state_dict)
        names.append(INIT_FILE)
    if write_head(directory, model.get_base_model()):
        names.append(HEAD_FILE)
    origin, files = provenance.write(directory, model, adapter_name)
    names += files
    write_settings(directory, config, {name: file_digest(os.path.join(directory, name)) for name in names}, origin)


def write_init_file(directory: str, model: PeftModel, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """A0, which never changes: a hard link to the run's last file of it where that holds the same tensors.

    Always under a new name first: writing into a linked file would change every checkpoint that shares it.
    """
    tensors = init_state_dict(model, adapter_name, state_dict)
    target = Path(directory, INIT_FILE)
    temporary = target.with_name(INIT_FILE + ".tmp")
    temporary.unlink(missing_ok=True)
    shared = init_files(model)
    source = shared.get(adapter_name)
    linked = False
    if source is not None and _holds(source, tensors):
        try:
            os.link(source, temporary)
            linked = True
        except OSError:  # another file system, or one without links
            pass
    if not linked:
        save_file(tensors, temporary, {"format": "pt"})
    temporary.replace(target)
    temporary.unlink(missing_ok=True)  # a rename onto another name of the same file leaves both
    shared[adapter_name] = str(target)


def init_files(model: PeftModel) -> dict[str, str]:
    """Adapter name -> where this model's A0 was last written to or read from."""
    files: dict[str, str] = model.__dict__.setdefault("_ba_lora_init_files", {})
    return files


def _holds(path: str, tensors: dict[str, Tensor]) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == set(tensors) and all(
                (there := file.get_tensor(key)).dtype == here.dtype and torch.equal(there, here)
                for key, here in tensors.items()
            )
    except (OSError, SafetensorError):  # rotated away, or damaged
        return False


def check_stock_file(directory: str, model: PeftModel, adapter_name: str) -> None:
    """Asserts that the written file holds exactly the stock pair of every layer, at the scaling PEFT will compute.

    Raises:
        RuntimeError: a frozen factor leaked in, a layer is missing, or the scaling would differ.
    """
    saved = LoraConfig.from_pretrained(directory)
    with safe_open(os.path.join(directory, WEIGHTS_FILE), framework="pt") as file:
        names = list(file.keys())
    lora_keys = {key for key in names if ".lora_" in key or "frozen_" in key}
    expected = set()
    for name, layer in delta_layers(model, adapter_name):
        expected |= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
        key = target_key(name.removeprefix(PEFT_PREFIX), layer)
        rank, scaling = _as_peft_reads(saved, key)
        both = torch.tensor([scaling, layer.scaling[adapter_name]], dtype=torch.float32)
        if rank != 2 * layer.r[adapter_name] or both[0] != both[1]:
            raise RuntimeError(
                f"the saved config would give layer {key} rank {rank} and scaling {scaling} instead of "
                f"{2 * layer.r[adapter_name]} and {layer.scaling[adapter_name]}: please report this."
            )
    if lora_keys != expected:
        raise RuntimeError(
            f"the saved adapter is not exactly the stock factors: unexpected {sorted(lora_keys - expected)[:3]}, "
            f"missing {sorted(expected - lora_keys)[:3]}: please report this."
        )


def write_settings(
    directory: str,
    config: BaLoraConfig,
    hashes: dict[str, str] | None = None,
    origin: dict[str, Any] | None = None,
) -> None:
    """Writes ba_lora.json; without `hashes` it says that no weights stand beside it yet. `origin`: see provenance."""
    from . import __version__

    # only what is set: another PEFT release may not know the rest
    neutral = type(config)().to_dict()
    values = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
        if (value != neutral.get(key) or key in ("r", "lora_alpha"))
        and key not in ("runtime_config", "auto_mapping", "peft_version", "inference_mode", "start_from")
    }
    settings = {
        "format_version": FORMAT_VERSION,
        "balora_plugin_version": __version__,
        "start": config.init_lora_weights,
        "delta_form": config.delta,
        "base_model": config.base_model_name_or_path,
        **(origin or {}),
        "regularizers": config.regularizers.to_dict(),
        "regularizers_in_force": config.regularizers.resolved(
            config.family
        ).to_dict(),  # for readers: presets may change
        "config": values,
        "ranks": ranks_here(),
        "sha256": hashes or {},
    }
    path = Path(directory, SETTINGS_FILE)
    temporary = path.with_suffix(f".json.{uuid.uuid4().hex}.tmp")  # Axolotl saves it on every rank at once
    temporary.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    temporary.replace(path)


def ranks_here() -> list[int]:
    """The ranks of this node, whose random states a Trainer writes beside the adapter; none for a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return []
    count = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return list(range(dist.get_rank(), dist.get_rank() + count))


def find_file(model_id: str, name: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Local path of one file of an adapter (a directory or a hub id), or None if it has none."""
    local = os.path.join(model_id, subfolder or "", name)
    if os.path.isfile(local):
        return local
    if os.path.isdir(model_id):
        return None
    try:
        return hf_hub_download(model_id, name, subfolder=subfolder, **hub)
    except LocalEntryNotFoundError:  # could not be asked: not the same as absent
        raise ValueError(
            f"{model_id!r} is no directory here, and the hub could not be reached for its {name}."
        ) from None
    except EntryNotFoundError:
        return None


def read_settings(model_id: str, subfolder: str | None = None, **hub: Any) -> dict[str, Any] | None:
    """ba_lora.json of an adapter, or None for an adapter that is not ours.

    Raises:
        ValueError: a damaged file, or a format version this release does not know.
    """
    path = find_file(model_id, SETTINGS_FILE, subfolder, **hub)
    if path is None:
        return None
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not JSON: the file was cut short or edited; use another checkpoint.") from None
    if settings.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={settings.get('format_version')!r} is not {FORMAT_VERSION}: "
            "it was written by another release of balora-plugin; upgrade with pip install -U balora-plugin."
        )
    return settings


def read_config(model_id: str, subfolder: str | None = None, **hub: Any) -> BaLoraConfig:
    """The BaLoraConfig an adapter was saved with; ValueError if it is not a BA-LoRA adapter.

    A `teacher_cache` is taken over only where that directory already is one: an adapter from elsewhere does not choose
    where files are written.
    """
    from .adapter.config import BaLoraConfig

    settings = read_settings(model_id, subfolder, **hub)
    if settings is None:
        raise ValueError(
            f"{model_id!r} holds no {SETTINGS_FILE}: it is not a BA-LoRA adapter (or its side files were not copied). "
            "As a plain LoRA it loads with peft.PeftModel.from_pretrained."
        )
    values = settings["config"]
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(BaLoraConfig)})
    if unknown:
        raise ValueError(
            f"{model_id!r} was saved with {unknown[0]}={values[unknown[0]]!r}, which this release of PEFT "
            f"({peft.__version__}) does not know: pip install -U peft."
        )
    config = BaLoraConfig(**values)
    cache = config.regularizers.teacher_cache
    if cache is not None and not os.path.isfile(os.path.join(cache, HEADER)):  # somebody else's path
        logger.warning(
            f"{model_id} was trained with teacher_cache={cache}, which is no teacher cache here: going on without; "
            "name one of your own to have it again."
        )
        config.regularizers = dataclasses.replace(config.regularizers, teacher_cache=None, teacher_cache_top_k=None)
    return config


def check_settings(settings: dict[str, Any], config: BaLoraConfig, model_id: str) -> None:
    """Refuses to load factors into an adapter that would scale them differently.

    Raises:
        ValueError: names the setting, both values and the remedy.
    """
    neutral = type(config)()
    for key in ("r", "lora_alpha", "use_rslora"):
        saved, here = settings["config"].get(key, getattr(neutral, key)), getattr(config, key)
        if saved != here:
            raise ValueError(
                f"{key}={here!r} here, but the adapter in {model_id!r} has {key}={saved!r}: write {saved!r}."
            )


def changed_files(settings: dict[str, Any], model_id: str, subfolder: str | None = None, **hub: Any) -> dict[str, str]:
    """{name: "is missing" or "is not the file that was saved"} of every file that ba_lora.json has a hash of."""
    found = {}
    for name, digest in settings["sha256"].items():
        path = find_file(model_id, name, subfolder, **hub)
        if path is None:
            found[name] = "is missing"
        elif file_digest(path) != digest:
            found[name] = "is not the file that was saved"
    return found


def read_factors(
    model: PeftModel, adapter_name: str, weights: dict[str, Tensor], init_path: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Splits a loaded stock file into (rank-r stock dict for PEFT, {layer name: the four exact factors}).

    Raises:
        ValueError: a layer missing from the file, or shapes of another rank.
    """
    a0 = load_file(init_path)
    split = {key: value for key, value in weights.items() if ".lora_" not in key}
    factors = {}
    for name, layer in delta_layers(model, adapter_name):
        keys = (f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.lora_A0.weight")
        missing = [key for key, source in zip(keys, (weights, weights, a0), strict=True) if key not in source]
        if missing:
            raise ValueError(f"the adapter lacks {missing[0]}: it was saved for other target modules or another model.")
        module_a, module_b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        a, b = weights[keys[0]], weights[keys[1]]
        if tuple(a.shape) != (2 * module_a.out_features, module_a.in_features) or tuple(b.shape) != (
            module_b.out_features,
            2 * module_b.in_features,
        ):
            raise ValueError(
                f"{keys[0]} is {tuple(a.shape)}, but this model's adapter has rank {layer.r[adapter_name]} "
                f"(2r x in = {(2 * module_a.out_features, module_a.in_features)}): load it with its own config."
            )
        d_a, d_b, b0 = split_factors(a, b, num_experts(layer))
        factors[name] = {"lora_A": d_a, "lora_B": d_b, "frozen_A": a0[keys[2]], "frozen_B": b0}
        split[keys[0]], split[keys[1]] = d_a, d_b
    foreign = sorted(key for key in weights if ".lora_" in key and key not in split)
    if foreign:
        raise ValueError(
            f"the adapter also holds {foreign[0]} ({len(foreign)} such tensors), which this model's config does not "
            "target: load it with its own config."
        )
    return split, factors


@torch.no_grad()
def copy_factors(model: PeftModel, adapter_name: str, factors: dict[str, dict[str, Tensor]]) -> None:
    """Copies the four factors of every layer, bit for bit, after PEFT has set and cast its own."""
    for name, layer in delta_layers(model, adapter_name):
        for attribute, value in factors[name].items():
            module = getattr(layer, attribute)[adapter_name]
            if module.weight.device.type == "meta":
                trained = layer.lora_A[adapter_name].weight
                device = value.device if trained.device.type == "meta" else trained.device
                module.weight = nn.Parameter(value.to(device), requires_grad=attribute not in FROZEN)
            else:
                module.weight.data.copy_(value)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
