"""A probe: the logits of base and adapted model on sixteen fixed tokens, stored so that anyone can compare his own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoint.location import AdapterFiles
from ..checkpoint.names import PROBE_FILE
from .quantised import quantised_layers_stay_in_training_mode
from .switch import TeacherSwitch

TOKENS = 16
POSITIONS = (3, 7, 11, 15)
COLUMNS = 2048  # of the vocabulary, evenly spaced: two models take 64 KiB
# of the logits' spread over the vocabulary: rounding in other kernels and devices
TOLERANCE = 1e-3
TOLERANCE_HALF = 5e-2
TOLERANCE_QUANTISED = 0.5  # a 4-bit base beside the same in full precision; two unrelated models are at about 1.4


@dataclass(frozen=True)
class Probe:
    """Logits (positions, columns) float32 at POSITIONS of `token_ids(vocabulary)`, columns `columns(vocabulary)`."""

    vocabulary: int
    base: Tensor | None
    adapted: Tensor | None = None


def token_ids(vocabulary: int) -> Tensor:
    """Returns the probe's tokens, (1, 16) int64, spread over a vocabulary of this size."""
    return (torch.arange(1, TOKENS + 1) * 2654435761 % vocabulary).unsqueeze(0)


def columns(vocabulary: int) -> Tensor:
    """Returns the entries of the vocabulary whose logits are kept, (n,) int64."""
    return torch.linspace(0, vocabulary - 1, min(vocabulary, COLUMNS), dtype=torch.float64).round().long()


def vocabulary_of(model: nn.Module) -> int | None:
    """Returns the size of a causal language model's vocabulary; None for what is none."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return None
    config: Any = model.config
    return None if config.is_encoder_decoder else int(config.get_text_config().vocab_size)


def base_logits(model: nn.Module) -> Tensor | None:
    """Returns the logits of a causal language model, adapters inside it switched off; None for another model."""
    with TeacherSwitch(model).off():
        return _logits(model)


def adapted_logits(model: PeftModel, adapter_name: str) -> Tensor | None:
    """Returns the logits of `model` with this adapter, in eval mode; what is active and what trains stays as it was."""
    with _active(model, adapter_name), TeacherSwitch(model).on():
        return _logits(model.get_base_model())


def _logits(model: Any) -> Tensor | None:
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        return None
    device = model.get_input_embeddings().weight.device
    with torch.autocast(device.type, enabled=False), quantised_layers_stay_in_training_mode(model):
        logits = model(input_ids=token_ids(vocabulary).to(device), use_cache=False).logits
    return logits[0, list(POSITIONS)].float().cpu()[:, columns(vocabulary)].contiguous()


@contextmanager
def _active(model: PeftModel, adapter_name: str) -> Iterator[None]:
    before = model.active_adapters
    if before == [adapter_name]:
        yield
        return
    trains = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.set_adapter(adapter_name)
        yield
    finally:
        if len(before) == 1:
            model.set_adapter(before[0])
        else:
            model.base_model.set_adapter(before)
        for p, flag in trains:
            p.requires_grad_(flag)


def write_probe(directory: str, probe: Probe) -> None:
    """Writes `ba_lora_probe.safetensors`: what there is of the logits, and the tokens for readers without us."""
    tensors = {
        "input_ids": token_ids(probe.vocabulary).int(),
        "positions": torch.tensor(POSITIONS, dtype=torch.int32),
        "columns": columns(probe.vocabulary).int(),
    }
    tensors |= {name: value for name in ("base", "adapted") if (value := getattr(probe, name)) is not None}
    metadata = {"format": "pt", "vocabulary": str(probe.vocabulary)}
    save_file(tensors, os.path.join(directory, PROBE_FILE), metadata)


def read_probe(path: str) -> Probe:
    """Reads a stored probe.

    Raises:
        ValueError: it was taken with other tokens or columns than this release takes.
    """
    with safe_open(path, framework="pt") as file:
        vocabulary = int((file.metadata() or {}).get("vocabulary", 0))
    tensors = load_file(path)
    if vocabulary < 1 or not (
        torch.equal(tensors["input_ids"].long(), token_ids(vocabulary))
        and torch.equal(tensors["columns"].long(), columns(vocabulary))
        and tensors["positions"].tolist() == list(POSITIONS)
    ):
        raise ValueError(f"{path} was taken on other tokens: use the release of balora-plugin that wrote it.")
    return Probe(vocabulary, tensors.get("base"), tensors.get("adapted"))


def stored_probe(files: AdapterFiles, settings: Mapping[str, Any] | None) -> Probe | None:
    """Returns the probe that an adapter's ba_lora.json (`settings`) names, None where it names none.

    Raises:
        ValueError: as [`read_probe`].
    """
    path = files.find(PROBE_FILE) if settings is not None and PROBE_FILE in settings["sha256"] else None
    return None if path is None else read_probe(path)


def discrepancy(logits: Tensor, recorded: Tensor) -> float:
    """Returns the distance of two sets of logits over the recorded ones' spread: 0 for the same, 1.4 for strangers.

    Rows are centred: a constant added to a row changes nothing that a model says.
    """
    if logits.shape != recorded.shape:
        return float("inf")
    one, other = (z.double() - z.double().mean(dim=1, keepdim=True) for z in (logits, recorded))
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def tolerance(*dtypes: str, quantised: bool = False) -> float:
    """Returns how large a discrepancy may be between models of these dtypes."""
    if quantised:
        return TOLERANCE_QUANTISED
    return TOLERANCE if all(dtype in ("float32", "float64") for dtype in dtypes) else TOLERANCE_HALF
