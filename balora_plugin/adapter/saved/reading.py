"""A saved adapter read back exactly: its four factors, the teacher's head, and what is refused."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from ...checkpoint.integrity import check_adapter
from ...checkpoint.location import AdapterFiles
from ...checkpoint.names import HEAD_FILE, INIT_FILE
from ...checkpoint.settings import read_settings
from ...pretrained.classifier_head import read_teacher_head
from ...pretrained.probe import stored_probe
from ..config import BaLoraConfig
from ..delta import FROZEN, num_experts, split_factors
from ..guard import native_factors
from . import provenance
from .fit import check_scalings, check_tensors
from .stock import delta_layers
from .writing import init_files


@dataclass(frozen=True)
class SavedAdapter:
    """The files of an adapter and what its ba_lora.json says; `settings` is None for an adapter that is not ours."""

    files: AdapterFiles
    settings: dict[str, Any] | None

    @classmethod
    def open(cls, model_id: str | os.PathLike[str], arguments: dict[str, Any]) -> SavedAdapter:
        """Reads the settings of the adapter at `model_id`; `arguments` are those of PEFT's load_adapter."""
        files = AdapterFiles.from_arguments(model_id, arguments)
        return cls(files, read_settings(files))

    @property
    def delta(self) -> bool:
        """Returns whether this is an adapter of ours in delta form."""
        return self.settings is not None and self.settings["delta_form"]

    def config_or(self, given: PeftConfig | None) -> BaLoraConfig:
        """Returns the config that was given, or of None the saved one.

        Raises:
            TypeError: another kind of config.
            ValueError: another rank or scaling than the saved factors have; nothing is saved here that is ours.
        """
        config = BaLoraConfig.from_settings(self.settings, str(self.files)) if given is None else given
        if not isinstance(config, BaLoraConfig):
            raise TypeError(f"config must be a BaLoraConfig, got {type(config).__name__}.")
        if self.settings is not None:
            check_settings(self.settings, config, str(self.files))
        return config


@dataclass(frozen=True)
class LoadOptions:
    """How an adapter is loaded, as PEFT's load_adapter says it; `trains`: to go on training, not for inference."""

    trains: bool = False
    device: str | None = None
    autocast_adapter_dtype: bool = True
    low_cpu_mem_usage: bool = False


def check_settings(settings: dict[str, Any], config: BaLoraConfig, model_id: str) -> None:
    """Refuses to load factors by a config that would scale them differently, or has another kind of them.

    Raises:
        ValueError: names the setting, both values and the remedy.
    """
    neutral = type(config)()
    for key in ("r", "lora_alpha", "use_rslora", "init_lora_weights"):
        saved, here = settings["config"].get(key, getattr(neutral, key)), getattr(config, key)
        same = settings["delta_form"] == config.delta if key == "init_lora_weights" else saved == here
        if not same:
            raise ValueError(
                f"{key}={here!r} here, but the adapter in {model_id!r} has {key}={saved!r}: write {saved!r}."
            )


def read_factors(
    model: PeftModel, adapter_name: str, weights: dict[str, Tensor], init_path: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Splits a loaded stock file into (rank-r stock dict for PEFT, {layer name: the four exact factors}).

    Raises:
        ValueError: a layer missing from the file of A0, or shapes of another rank.
    """
    a0 = load_file(init_path)
    split = {key: value for key, value in weights.items() if ".lora_" not in key}
    factors = {}
    for name, layer in delta_layers(model, adapter_name):
        keys = (f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.lora_A0.weight")
        if keys[2] not in a0:
            raise ValueError(f"the adapter lacks {keys[2]}: it was saved for other target modules or another model.")
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


def load_delta(model: PeftModel, adapter_name: str, saved: SavedAdapter, options: LoadOptions) -> Any:
    """Restores the four factors of an adapter in delta form, bit for bit, into one of the same settings.

    Returns what PEFT's own load_adapter gives: the keys that were missing and unexpected.

    Raises:
        ValueError: files that are not whole, or of an adapter with another rank, scaling or base.
    """
    assert saved.settings is not None
    config = saved.settings["config"]
    check_scalings(model, adapter_name, config, str(saved.files))
    check_adapter(saved.settings, saved.files)
    if options.trains:
        check_same_base(model, saved)
    init_path = saved.files.find(INIT_FILE)
    if init_path is None:
        raise ValueError(
            f"{str(saved.files)!r} lacks {INIT_FILE}: without A0 training cannot go on. For inference load it with "
            "peft.PeftModel.from_pretrained."
        )
    weights = load_peft_weights(str(saved.files), device=options.device or "cpu", **saved.files.arguments())
    check_tensors(model, adapter_name, weights, config.get("modules_to_save"), str(saved.files))
    split, factors = read_factors(model, adapter_name, weights, init_path)
    with native_factors():
        result = set_peft_model_state_dict(
            model, split, adapter_name=adapter_name, low_cpu_mem_usage=options.low_cpu_mem_usage
        )
    # an existing adapter keeps the dtype that a host gave it (TRL: bfloat16 over quantised bases), or a resumed run
    # would go on in another one; with low_cpu_mem_usage the file's dtype came with its tensors
    if options.low_cpu_mem_usage:
        model.base_model._cast_adapter_dtype(
            adapter_name=adapter_name, autocast_adapter_dtype=options.autocast_adapter_dtype
        )
    copy_factors(model, adapter_name, factors)
    if os.path.isdir(str(saved.files)):
        init_files(model)[adapter_name] = init_path
    result.missing_keys.clear()  # base weights; read_factors has checked the adapter's own
    return result


def restore_teacher_head(model: PeftModel, saved: SavedAdapter) -> None:
    """Gives a classifier's teacher the head that the run began with: this model's own is a new random one."""
    if saved.settings is not None and HEAD_FILE in saved.settings["sha256"]:
        path = saved.files.find(HEAD_FILE)
        assert path is not None  # check_adapter
        read_teacher_head(path, model.get_base_model())


def check_same_base(model: PeftModel, saved: SavedAdapter) -> None:
    """Refuses to go on training on another base than the one the adapter was trained on.

    Raises:
        ValueError: another base; names both.
    """
    if saved.settings is not None:
        read_probe = partial(stored_probe, saved.files, saved.settings)
        provenance.check_base(model, saved.settings, str(saved.files), read_probe)
