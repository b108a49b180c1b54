"""The pre-trained model as teacher: the same weights with the adapters switched off. No second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def teacher_mode(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what the pre-trained model computes: adapters off, eval mode, no gradient.

    A flag, not PEFT's `disable_adapter()`: that one re-enables gradients on frozen adapters when it exits, and breaks
    non-reentrant checkpointing. `modules_to_save` fall back to their initial copy by the same flag. Every module's flag
    is restored as it was.
    """
    switched: list[tuple[Any, bool]] = []
    evaluated: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            switched.append((module, module._disable_adapters))
            module._disable_adapters = True
        if module.training and not is_quantised_linear(module):
            evaluated.append(module)
            module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, disabled in switched:
            module._disable_adapters = disabled
        for module in evaluated:
            module.training = True


def is_quantised_linear(module: nn.Module) -> bool:
    """A bitsandbytes layer: its CPU eval-mode forward repacks the weight in place; gradients are wrong after it."""
    return type(module).__module__.startswith("bitsandbytes.")


@contextmanager
def quantised_layers_stay_in_training_mode(model: nn.Module) -> Iterator[None]:
    """For an evaluation in the middle of training: see [`is_quantised_linear`]."""
    changed = [m for m in model.modules() if is_quantised_linear(m) and not m.training]
    for module in changed:
        module.training = True
    try:
        yield
    finally:
        for module in changed:
            module.training = False
