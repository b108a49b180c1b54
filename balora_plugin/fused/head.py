"""The LM head as plain tensors: what turns hidden states into logits. Imports torch alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """logits = softcap((hidden @ weight.T + bias) * scale); weight (V, d), bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None
    sources: tuple[Tensor | None, ...] = ()  # what weight and bias are, or were gathered or dequantised from
    dequantised: bool = False

    @property
    def trains(self) -> bool:
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
