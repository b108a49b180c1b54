"""An adapter at one rank and one scaling for all layers, as servers need it; the smallest rank; what that loses."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig
from torch import Tensor

from ..adapter.delta import PEFT_PREFIX
from .algebra import from_experts, pad_rank, relative, singular_values, smallest_rank, truncate
from .lora_file import Adapter, Update, shown


@dataclass(frozen=True)
class Errors:
    """How far an adapter's updates are from another's, relative to the latter's, Frobenius norm."""

    total: float
    by_layer: dict[str, float]

    def worst(self, count: int = 3) -> list[tuple[str, float]]:
        """Returns the layers that lose most, and their errors."""
        return sorted(self.by_layer.items(), key=lambda item: -item[1])[:count]


def one_rank(adapter: Adapter, rank: int | None = None, dtype: torch.dtype | None = None) -> Adapter:
    """Returns the adapter with one rank and one scaling for all layers, as servers need it.

    They read `r` and `lora_alpha` alone, some of them as whole numbers.

    rank None: every layer keeps its update exactly, smaller ones are filled up with zeros. Otherwise every update is
    cut to its leading `rank` directions. A scaling that no whole lora_alpha gives exactly (rsLoRA's), or that another
    layer does not have, goes into B, which is rounded once. `dtype`: of the tensors written (None: as they are).

    Raises:
        ValueError: a value that overflows in `dtype`.
    """
    target = adapter.rank if rank is None else rank
    common = next(iter(adapter.updates.values())).scaling
    keeps = rank is None and all(update.scaling == common for update in adapter.updates.values())
    alpha = round(common * target) if keeps else target
    keeps = keeps and alpha / target == common
    alpha, scaling = (alpha, common) if keeps else (target, 1.0)
    updates = {}
    for name, update in shown(adapter.updates, "Cutting" if rank is not None else "Writing"):
        a, b = update.factors()
        if rank is not None:
            a, b = truncate(a, b, rank, update.scaling)
        elif not keeps:
            b = b.double() * update.scaling
        a, b = from_experts(*pad_rank(a, b, target))
        kind = dtype or update.a.dtype
        updates[name] = Update(_cast(name, a, kind), _cast(name, b, kind), scaling, update.experts)
    others = {
        name: _cast(name, value, dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in adapter.others.items()
    }
    config = plain_config(adapter.config, target, alpha)
    return replace(adapter, config=config, updates=updates, others=others, settings=None, metadata={})


def plain_config(config: LoraConfig, rank: int, alpha: int) -> LoraConfig:
    """Returns a copy of a config with this rank and lora_alpha for all layers: no rsLoRA, no patterns."""
    plain = deepcopy(config)
    plain.r, plain.lora_alpha = rank, alpha
    plain.use_rslora, plain.rank_pattern, plain.alpha_pattern = False, {}, {}
    plain.init_lora_weights, plain.inference_mode = True, True
    return plain


def smallest(
    adapter: Adapter, max_error: float, dtype: torch.dtype | None = None, loss: Callable[[Adapter], float] | None = None
) -> Adapter:
    """Returns the adapter at the smallest rank whose measured loss, that of the cast included, is at most `max_error`.

    One rank for all layers: servers make room for the largest, and some ignore `rank_pattern`. `loss` measures a cut
    adapter; None: the error of its updates. Found by bisection: of a loss that does not fall with every rank, a rank
    that is enough while the one below it is not.

    Raises:
        ValueError: the cast alone loses more.
    """
    measure = loss or (lambda cut: errors(cut, adapter).total)
    low, high = 1, adapter.rank
    if loss is None:  # what is left out decides, but for the cast
        low = smallest_rank(
            [singular_values(*u.factors(), u.scaling) for _, u in shown(adapter.updates, "Spectra")], max_error
        )
    best = one_rank(adapter, low, dtype)
    lost = measure(best)
    if lost <= max_error:
        return best
    if low < high:
        best = one_rank(adapter, high, dtype)
        lost = measure(best)
    if not lost <= max_error:
        raise ValueError(
            f"max_error={max_error:g} cannot be met in {str(best.dtype).removeprefix('torch.')}: the full rank "
            f"{high} is {lost:.2g} off. Write float32, or a larger error."
        )
    while high - low > 1:  # low fails, high is enough
        middle = (low + high) // 2
        tried = one_rank(adapter, middle, dtype)
        if measure(tried) <= max_error:
            best, high = tried, middle
        else:
            low = middle
    return best


def errors(adapter: Adapter, exact: Adapter) -> Errors:
    """Measures how far `adapter` is from `exact`, from the factors alone, in float64."""
    by_layer, lost, whole = {}, 0.0, 0.0
    for name, update in shown(exact.updates, "Measuring"):
        other = adapter.updates[name]
        norm = update.norm()
        same = other.scaling == update.scaling and torch.equal(other.a, update.a) and torch.equal(other.b, update.b)
        error = 0.0 if same else other.distance(update)
        by_layer[name.removeprefix(PEFT_PREFIX)] = relative(error, norm)
        lost, whole = lost + error**2, whole + norm**2
    return Errors(relative(math.sqrt(lost), math.sqrt(whole)), by_layer)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype).contiguous()
    if not bool(torch.isfinite(cast).all()):
        raise ValueError(f"{name} overflows in {str(dtype).removeprefix('torch.')}: use bfloat16 or float32.")
    return cast
