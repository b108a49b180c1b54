"""How large the values of tensors are, NaN and inf included: one fused reduction, without waiting for the device."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def largest_values(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the largest magnitude of each tensor, float32 (n,), on the device of the first; NaN where it holds one.

    Of a tensor that FSDP or ZeRO-3 has split over the ranks it is that of this rank's part; of an empty part 0.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    parts = [_local(tensor.detach()) if not hasattr(tensor, "ds_tensor") else tensor.ds_tensor for tensor in tensors]
    for index, part in enumerate(parts):
        if part.is_floating_point() and part.numel() and not part.is_meta:
            groups[part.device, part.dtype].append(index)
    device = parts[0].device if parts and not parts[0].is_meta else torch.device("cpu")
    found = [torch.zeros((), device=device)] * len(parts)
    for members in groups.values():
        largest = torch._foreach_norm([parts[index] for index in members], math.inf)
        for index, value in zip(members, largest, strict=True):
            found[index] = value.to(device, torch.float32)
    return torch.stack(found) if found else torch.zeros(0)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor that holds NaN or inf, None if all are finite; waits for the device."""
    values = largest_values(list(tensors.values())).tolist()
    return next((name for name, value in zip(tensors, values, strict=True) if not math.isfinite(value)), None)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; another tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
