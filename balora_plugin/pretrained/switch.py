"""The pre-trained model as teacher: the same weights with the adapters switched off. No second model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .quantised import is_quantised_linear


class TeacherSwitch:
    """Switches a model to the pre-trained one and back. Holds its lists of modules: a walk over 3,500 takes 5 ms.

    A flag, not PEFT's `disable_adapter()`: that one re-enables gradients on frozen adapters when it exits, and breaks
    non-reentrant checkpointing. `modules_to_save` fall back to their initial copy by the same flag. bitsandbytes layers
    stay in training mode: in eval mode they are another function on a CPU (see [`balora_plugin.pretrained.quantised`]).
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._adapters: list[Any] = [m for m in modules if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        self._others = [m for m in modules if not is_quantised_linear(m)]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Makes the model the teacher inside the block: adapters off, eval mode, no gradient.

        Every module's flag is restored as it was.
        """
        with self._still(disabled=True):
            yield

    @contextmanager
    def on(self) -> Iterator[None]:
        """Makes the model the student at rest inside the block: adapters on, eval mode, no gradient.

        Every module's flag is restored as it was.
        """
        with self._still(disabled=False):
            yield

    @contextmanager
    def layers_off(self) -> Iterator[None]:
        """Lets adapted layers compute the base's function inside the block; what modules_to_save trains stays on."""
        before = [(m, m._disable_adapters) for m in self._adapters if isinstance(m, BaseTunerLayer)]
        try:
            for module, _ in before:
                module._disable_adapters = True
            yield
        finally:
            for module, was in before:
                module._disable_adapters = was

    @contextmanager
    def _still(self, *, disabled: bool) -> Iterator[None]:
        before = [(module, module._disable_adapters) for module in self._adapters]
        training = [module for module in self._others if module.training]
        try:
            for module, _ in before:
                module._disable_adapters = disabled
            for module in training:  # past nn.Module.__setattr__, which costs more than the rest of this
                module.__dict__["training"] = False
            with torch.no_grad():
                yield
        finally:
            for module, was in before:
                module._disable_adapters = was
            for module in training:
                module.__dict__["training"] = True
