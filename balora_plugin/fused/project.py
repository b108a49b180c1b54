"""Hidden states to logits: the LM head with its bias, scale and softcap, and the way back. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..regularizers import upcast


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the head's product runs in: the wider of the two, under autocast autocast's, like the model's own head."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """softcap((hidden @ weight.T + bias) * scale) in float32 (float64 for float64 inputs).

    hidden (M, d), weight (V, d), bias (V,) -> (M, V). The product runs in `product_dtype`; only its result is widened.
    """
    dtype = product_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = upcast(logits)
        if scale != 1.0:
            logits = logits * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
    return logits


class Projection:
    """The same over chunks into given buffers, and the way back from the logits' gradient. Holds no graph."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
        wide: torch.dtype,
    ) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.scale, self.softcap = scale, softcap
        self.narrow = dtype != wide

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden (C, d) of the product's dtype -> out (C, V), float32 or float64."""
        if self.narrow:
            out.copy_(F.linear(hidden, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(hidden, self.weight.T, out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=out)
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def slope(self, z: Tensor, out: Tensor) -> Tensor:
        """(C, V) derivative of the capped logits z by the uncapped ones, in `out`."""
        return torch.div(z, self.softcap or 1.0, out=out).square_().neg_().add_(1.0)

    def into_hidden(self, gradient: Tensor, out: Tensor) -> None:
        """gradient (C, V) by the logits before the cap, in the product's dtype -> out (C, d)."""
        if out.dtype == gradient.dtype:
            torch.mm(gradient, self.weight, out=out)
        else:
            out.copy_(gradient @ self.weight)
        if self.scale != 1.0:
            out.mul_(self.scale)

    def into_weight(self, gradient: Tensor, hidden: Tensor, out: Tensor) -> None:
        """gradient (C, V), hidden (C, d) -> added to out (V, d)."""
        if self.narrow:
            out.add_(gradient.T @ hidden, alpha=self.scale)
        else:
            out.addmm_(gradient.T, hidden, alpha=self.scale)


def default_chunk(vocabulary: int, device_type: str = "cpu") -> int:
    """Rows a chunk, at least 16: float32 logits of 256 MiB on a GPU, of 32 MiB on a CPU (64 where 128 rows need them).

    Fewer rows make the products slower, more cost memory and gain nothing.
    """
    vocabulary = max(vocabulary, 1)
    rows = max(2**23 // vocabulary, min(128, 2**24 // vocabulary)) if device_type == "cpu" else 2**26 // vocabulary
    return min(max(rows, 16), 4096)


def block_rows(vocabulary: int, chunk_size: int, device_type: str) -> int:
    """Rows of a chunk that the passes over its logits take at a time: on a CPU 1 MiB, which stays in its cache."""
    return min(chunk_size, max(2**18 // max(vocabulary, 1), 1)) if device_type == "cpu" else chunk_size
