"""Hidden states to logits: the LM head with its bias, scale and softcap, and the way back. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..regularizers import upcast
from .head import Head

_LIFTED = 16.0  # the largest entry of a lifted gradient: sums of it stay within float16, 1e-9 of it above its least


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the head's product runs in: the wider of the two, under autocast autocast's, like the model's own head."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def project(hidden: Tensor, head: Head) -> Tensor:
    """softcap((hidden @ weight.T + bias) * scale) in float32 (float64 for float64 inputs).

    hidden (M, d), a head of V tokens -> (M, V). The product runs in `product_dtype`; only its result is widened.
    """
    weight, bias, scale, softcap = head.weight, head.bias, head.scale, head.softcap
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
    """The same over chunks into given buffers, and the way back from the logits' gradient. Holds no graph.

    `unit`: what the logits are counted in, in nats: log 2 where their exponentials are taken to the base 2. Not for
    products in another dtype than the logits'.
    """

    def __init__(self, head: Head, dtype: torch.dtype, wide: torch.dtype, unit: float = 1.0) -> None:
        self.weight = head.weight.to(dtype)
        self.bias = None if head.bias is None else head.bias.to(dtype)
        self.scale, self.cap = head.scale, None if head.softcap is None else head.softcap / unit
        self.narrow = dtype != wide
        self.factor = head.scale / (head.softcap or unit)  # on the product, before the cap
        if self.bias is not None and self.factor != 1.0 and not self.narrow:
            self.bias = self.bias * self.factor

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """hidden (C, d) of the product's dtype -> out (C, V), float32 or float64."""
        if self.narrow:
            out.copy_(F.linear(hidden, self.weight, self.bias))
            if self.factor != 1.0:
                out.mul_(self.factor)
        else:
            if self.factor != 1.0:  # on the few columns that go in: not a pass over what comes out
                hidden = hidden * self.factor
            if self.bias is None:
                torch.mm(hidden, self.weight.T, out=out)
            else:
                torch.addmm(self.bias, hidden, self.weight.T, out=out)
        if self.cap is not None:
            out.tanh_().mul_(self.cap)
        return out

    def slope(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        """The derivative of the capped logits z, of any shape, by the uncapped ones, in `out`."""
        return torch.div(z, self.cap or 1.0, out=out).square_().neg_().add_(1.0)

    def narrowed(self, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """gradient (C, V) in the product's dtype, and the power of two (0-d) it was multiplied by, if any.

        float16 would lose most of a term that is small: its factors of 1e-4 and probabilities of 1e-5 are below its
        range, and a host's loss scale comes too late.
        """
        if self.weight.dtype != torch.float16:
            return gradient.to(self.weight.dtype), None
        tiny = torch.finfo(gradient.dtype).tiny
        lift = torch.exp2(torch.floor(torch.log2(_LIFTED / gradient.abs().amax().clamp_min(tiny)))).clamp(max=2.0**64)
        return gradient.mul_(lift).to(torch.float16), lift

    def into_hidden(self, gradient: Tensor, lift: Tensor | None, out: Tensor) -> None:
        """gradient (C, V) by the logits before the cap, from `narrowed` -> out (C, d)."""
        if out.dtype == gradient.dtype:
            torch.mm(gradient, self.weight, out=out)
        else:
            out.copy_(gradient @ self.weight)
        if lift is not None:
            out.div_(lift)
        if self.scale != 1.0:
            out.mul_(self.scale)

    def into_weight(self, gradient: Tensor, lift: Tensor | None, hidden: Tensor, out: Tensor) -> None:
        """gradient (C, V), hidden (C, d) -> added to out (V, d)."""
        if self.narrow:
            product = gradient.T @ hidden
            out.add_(product if lift is None else product.to(out.dtype).div_(lift), alpha=self.scale)
        else:
            out.addmm_(gradient.T, hidden, alpha=self.scale)


def default_chunk(vocabulary: int, device_type: str = "cpu", hidden_size: int = 0) -> int:
    """Rows a chunk, at least 16: float32 logits of 128 MiB on a GPU; of 32 MiB on a CPU, of 64 for wide states.

    Fewer rows make the products slower, the wider the states the more; more than 512 on a CPU and 4096 on a GPU cost
    memory and gain nothing. Whole tiles of 32 rows where there are any.
    """
    vocabulary = max(vocabulary, 1)
    if device_type == "cpu":
        largest = 2**24 // vocabulary
        rows = largest if hidden_size >= 1024 else max(2**23 // vocabulary, min(128, largest))
    else:
        rows = 2**25 // vocabulary
    return min(max(rows // 32 * 32 or rows, 16), 512 if device_type == "cpu" else 4096)


def block_rows(vocabulary: int, device_type: str, *, compiled: bool = False) -> int:
    """Rows of a chunk that the passes over its logits take at a time.

    On a CPU 1 MiB, which stays in its cache (compiled, with less between the passes, 4). On a GPU 64 MiB: the scratch
    stays small beside the logits, and a pass takes longer than its launch.
    """
    size = (2**20 if compiled else 2**18) if device_type == "cpu" else 2**24
    return max(size // max(vocabulary, 1), 1)
