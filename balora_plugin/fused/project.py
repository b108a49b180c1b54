"""Hidden states to logits: the LM head with its bias, scale and softcap. Imports torch alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..regularizers import upcast


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """softcap((hidden @ weight.T + bias) * scale) in float32 (float64 for float64 inputs).

    hidden (M, d), weight (V, d), bias (V,) -> (M, V). The product runs in the wider of the two dtypes (under autocast:
    in autocast's), like the model's own head; only its result is widened.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
    with torch.autocast(device_type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        logits = upcast(logits)
        if scale != 1.0:
            logits = logits * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
    return logits


def default_chunk(vocabulary: int) -> int:
    """Rows a chunk, so that one chunk of float32 logits stays near 64 MiB and never below 16 rows."""
    return min(max(2**24 // max(vocabulary, 1), 16), 4096)
