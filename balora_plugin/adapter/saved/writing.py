"""The files beside a saved adapter's stock pair: A0, the settings, a classifier's head, where it came from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...atomic import remove_abandoned, replacing
from ...checkpoint.names import CONFIG_FILE, HEAD_FILE, INIT_FILE, WEIGHTS_FILE
from ...checkpoint.settings import file_digest, write_settings
from ...finite import first_not_finite
from ...pretrained.classifier_head import write_teacher_head
from ..delta import PEFT_PREFIX
from . import provenance
from .stock import check_stock_file, delta_layers


def check_finite(adapters: Sequence[str], state_dict: Mapping[str, Tensor]) -> None:
    """Refuses to save adapters of which any tensor holds NaN or inf: factors, and modules_to_save.

    Raises:
        FloatingPointError: names the adapter and the tensor.
    """
    for name in adapters:
        bad = first_not_finite({key: value for key, value in state_dict.items() if f".{name}." in f"{key}."})
        if bad is not None:
            raise FloatingPointError(
                f"cannot save adapter {name!r}: {bad} holds NaN or inf. Nothing was written: go on from the last "
                "checkpoint, with a lower learning_rate."
            )


def init_state_dict(model: PeftModel, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns A0 of every layer, `<layer>.lora_A0.weight` -> (r, in), on the CPU."""
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
    of_base = {key.removeprefix(PEFT_PREFIX): value for key, value in state_dict.items()}
    if write_teacher_head(directory, model.get_base_model(), of_base):
        names.append(HEAD_FILE)
    origin, files = provenance.write(directory, model, adapter_name)
    names += files
    hashes = {name: file_digest(os.path.join(directory, name)) for name in names}
    write_settings(directory, {**origin, **config.to_settings()}, hashes)


def write_init_file(directory: str, model: PeftModel, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Writes A0, which never changes: a hard link to the run's last file of it where that holds the same tensors.

    Always under a new name first: writing into a linked file would change every checkpoint that shares it.
    """
    tensors = init_state_dict(model, adapter_name, state_dict)
    target = Path(directory, INIT_FILE)
    shared = init_files(model)
    source = shared.get(adapter_name)
    remove_abandoned(target)
    with replacing(target) as temporary:
        linked = False
        if source is not None and _holds(source, tensors):
            with suppress(OSError):  # another file system, or one without links
                os.link(source, temporary)
                linked = True
        if not linked:
            save_file(tensors, temporary, {"format": "pt"})
    shared[adapter_name] = str(target)


def init_files(model: PeftModel) -> dict[str, str]:
    """Returns where this model's A0 was last written to or read from, by adapter name."""
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
