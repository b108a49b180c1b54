"""What a `compute_loss` of somebody else's gets beside the loss: logits that are made when they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput


class LazyLogits(CausalLMOutput):
    """A causal language model's output whose `logits` (B, T, V) are computed, with their graph, at the first look.

    Nothing is held for a caller that never looks: counted tokens x vocabulary numbers are what training leaves out.
    """

    def __init__(self, loss: Tensor, make: Callable[[], Tensor]) -> None:
        super().__init__(loss=loss)
        object.__setattr__(self, "_make", make)

    def __getattribute__(self, name: str) -> Any:
        if name == "logits":
            made = super().__getattribute__("logits")
            make = self.__dict__.get("_make")
            if made is not None or make is None:
                return made
            self["logits"] = make()
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        if key != "loss" and key != 0:
            _ = self.logits
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Returns the value of `key`, as a dict does."""
        return self.logits if key == "logits" else super().get(key, default)

    def __contains__(self, key: object) -> bool:
        return key == "logits" or super().__contains__(key)
