"""Products in the dtype of their factors, whatever else a user allows. Imports torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype: autocast or TF32 would round float32 factors to 8 or 10 bits of a spectrum."""
    with exact_products(a):
        return a @ b


@contextmanager
def exact_products(like: Tensor) -> Iterator[None]:
    """Inside, products of tensors like this one are not rounded: no autocast, no TF32, no bfloat16 on a CPU."""
    with torch.autocast(like.device.type, enabled=False):
        settings = _settings(like.device) if like.dtype == torch.float32 else None
        if settings is None:
            yield
            return
        key = "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32"  # torch refuses a mix of both
        was = getattr(settings, key)
        setattr(settings, key, "ieee" if key == "fp32_precision" else False)
        try:
            yield
        finally:
            setattr(settings, key, was)


def _settings(device: torch.device) -> Any:
    """What torch keeps of float32 products on a device; None where it keeps nothing."""
    if device.type == "cuda":
        return torch.backends.cuda.matmul
    found = getattr(torch.backends.mkldnn, "matmul", None) if device.type == "cpu" else None
    return found if hasattr(found, "fp32_precision") else None
