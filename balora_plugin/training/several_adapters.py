"""Adapters of other names than `default`, or several: a host loads of a checkpoint the one at its top, or one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME


def load_adapters(model: Any, directory: str) -> bool:
    """Loads every adapter of a model from a checkpoint, each from the directory that PEFT saves it in.

    What is active, and what trains, stays so. Returns False, nothing loaded, where that is the host's: of a model with
    `default` alone, or without an adapter, and where the checkpoint lacks one that is active.
    """
    if not isinstance(model, PeftModel) or list(model.peft_config) == ["default"]:
        return False
    places = {name: directory if name == "default" else os.path.join(directory, name) for name in model.peft_config}
    there = [name for name, place in places.items() if os.path.isfile(os.path.join(place, CONFIG_NAME))]
    active = list(model.active_adapters)
    if not set(active) <= set(there):
        return False
    with _kept(model, active):
        for name in there:
            model.load_adapter(places[name], name, is_trainable=name in active)
    return True


@contextmanager
def _kept(model: PeftModel, active: list[str]) -> Iterator[None]:
    """Behind it, what was active, and what trained, is so again."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    idle = {name: config.inference_mode for name, config in model.peft_config.items()}
    yield
    if list(model.active_adapters) != active:
        model.base_model.set_adapter(active)
    for name, was in idle.items():
        model.peft_config[name].inference_mode = was
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
