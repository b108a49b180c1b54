"""The LM head as plain tensors: what turns hidden states into logits. Imports torch alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Head(NamedTuple):
    """logits = softcap((hidden @ weight.T + bias) * scale); weight (V, d), bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    sources: tuple[Tensor | None, ...] = ()  # what weight and bias are, or were gathered or dequantised from
    dequantised: bool = False

    @property
    def trains(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @property
    def alone(self) -> Head:
        """The same without its sources: a graph that is given them would hold what it never reads."""
        return Head(self.weight, self.bias, self.scale, self.softcap)
