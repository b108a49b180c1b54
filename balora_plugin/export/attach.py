"""An adapter given to a loaded base, as unmodified PEFT has it; a base whose vocabulary training made larger."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from ..adapter.delta import PEFT_PREFIX
from .algebra import from_experts, pad_rank
from .lora_file import Adapter, Update, state_dict
from .reduced import plain_config


def attach(base: Any, adapter: Adapter) -> PeftModel:
    """Gives `base` this adapter, as unmodified PEFT has it; nothing is written to a file on the way.

    Raises:
        ValueError: the adapter does not fit the base; names a tensor.
    """
    config = plain_config(adapter.config, adapter.rank, adapter.rank)  # scaling 1: see `exchange`
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise ValueError(f"{adapter.directory!r} does not fit this base: {error}") from None
    exchange(model, adapter)
    return model.eval()


def exchange(model: PeftModel, adapter: Adapter) -> None:
    """Puts the tensors of another adapter of the same layers into a model that [`attach`] made; its rank may be lower.

    Raises:
        ValueError: the adapter does not fit; names a tensor.
    """
    full = _scaling_inside(adapter, model.peft_config["default"].r)
    try:
        filled = _fill(model, full.updates)
        tensors = dict(full.others) if filled else state_dict(full)  # PEFT takes out of it what it has set
        result = set_peft_model_state_dict(model, tensors)
    except RuntimeError as error:
        raise ValueError(f"{adapter.directory!r} does not fit this base: {error}") from None
    missing = [key for key in result.missing_keys if (".lora_" in key and not filled) or "modules_to_save" in key]
    odd = [*missing, *result.unexpected_keys]
    if odd:
        raise ValueError(f"{adapter.directory!r} does not fit this base: {odd[0]} is in one of them alone.")


@torch.no_grad()
def _fill(model: PeftModel, updates: dict[str, Update]) -> bool:
    """Copies factors into the layers of their names; returns False, with nothing done, if those are not the model's.

    PEFT renames what it loads, by patterns for files of earlier releases; some of them fit today's names too (Laguna's
    shared experts), whose tensors it then leaves out.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and (layer.lora_A or layer.lora_embedding_A)
    }
    if layers.keys() != updates.keys() or any(layer.lora_embedding_A for layer in layers.values()):
        return False
    for name, update in updates.items():
        layers[name].lora_A["default"].weight.copy_(update.a)
        layers[name].lora_B["default"].weight.copy_(update.b)
    return True


def _scaling_inside(adapter: Adapter, rank: int) -> Adapter:
    """Returns the adapter in float32 at this rank, filled up with zeros, each scaling multiplied into B."""
    updates = {}
    for name, update in adapter.updates.items():
        a, b = update.factors()
        a, b = from_experts(*pad_rank(a.float(), (b.double() * update.scaling).float(), rank))
        updates[name] = replace(update, a=a, b=b, scaling=1.0)
    return replace(adapter, updates=updates)


@dataclass(frozen=True)
class Resized:
    """A base that got the rows of its training; `whole`: all of them are known, so that it is that very base."""

    rows: int
    whole: bool


@torch.no_grad()
def fit_vocabulary(base: Any, adapter: Adapter) -> Resized | None:
    """Gives `base` (in place) as many rows of embedding and head as it had in training; None where it has them.

    Where tokens were added the file holds the whole embedding and head of its base. An exported file holds only what
    was trained in the place of them: new rows that are not known are zero.
    """
    layers = _embeddings(base)
    rows = max((adapter.others[key].shape[0] for key in layers if key in adapter.others), default=0)
    here = base.get_input_embeddings().weight.shape[0]
    own = {key: adapter.originals[key] for key in layers if key in adapter.originals}
    if rows == here or not rows or (rows < here and not own):
        return None
    base.resize_token_embeddings(rows, mean_resizing=False)
    layers = _embeddings(base)
    for layer in layers.values():
        layer.weight[here:] = 0.0
    for key, value in own.items():  # after all zeros: two of these layers may be one tensor
        if value.shape == layers[key].weight.shape:
            layers[key].weight.copy_(value)
    return Resized(rows, own.keys() == layers.keys())


def _embeddings(base: Any) -> dict[str, Any]:
    """Returns the base's input embedding and head, by the names of their weights in an adapter's file."""
    ends: list[nn.Module | None] = [base.get_input_embeddings(), base.get_output_embeddings()]
    return {f"{PEFT_PREFIX}{name}.weight": m for name, m in base.named_modules() if any(m is end for end in ends)}
