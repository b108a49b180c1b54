"""Adapters whose start moved a part of the base into them: they belong to a residual base until they are converted.

PEFT's `init_lora_weights="pissa"` (and olora, corda, lora_ga) saves factors A, B for W_res = W - s B0 A0. With the
adapter as it was before training, A0, B0, the update of the original base is s (B A - B0 A0).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from ..adapter.delta import PEFT_PREFIX, stack_factors
from .algebra import relative
from .lora_file import Adapter, shown

_RAW_STARTS = ("pissa", "olora", "corda", "lora_ga")
NOT_A_START = 0.1  # rounding to bfloat16 leaves a hundredth


def raw_start(adapter: Adapter) -> str | None:
    """Returns the start of an adapter whose file belongs to a residual base, or None for a LoRA of its own base."""
    start = str(adapter.config.init_lora_weights).lower()
    return start if adapter.settings is None and start.startswith(_RAW_STARTS) else None


def converted(adapter: Adapter, initial: Adapter) -> Adapter:
    """Returns the rank-2r LoRA for the original base: s (B A - B0 A0) = s [B0, dB] [dA; A].

    With dA = A - A0, dB = B - B0 nothing large cancels: the layout of our own files.

    Raises:
        ValueError: `initial` is not the adapter that this one started as; names what differs.
    """
    ours, theirs = adapter.updates, initial.updates
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())[0]
        raise ValueError(
            f"{odd} is in {(adapter if odd in ours else initial).directory!r} alone: the initial adapter "
            f"{initial.directory!r} adapts other layers; pass the one that {adapter.directory!r} started as."
        )
    updates = {}
    for name, update in ours.items():
        start = theirs[name]
        for what, one, other in (
            ("rank", update.rank, start.rank),
            ("shape", (tuple(update.a.shape), tuple(update.b.shape)), (tuple(start.a.shape), tuple(start.b.shape))),
            ("scaling", update.scaling, start.scaling),
        ):
            if one != other:
                raise ValueError(
                    f"{name}: {what} {one} in {adapter.directory!r}, {other} in the initial adapter "
                    f"{initial.directory!r}: pass the one it started as."
                )
        wide = torch.promote_types(update.a.dtype, torch.float32)
        a0, b0 = start.a.to(wide), start.b.to(wide)
        a, b = stack_factors(update.a.to(wide) - a0, update.b.to(wide) - b0, a0, b0, update.experts)
        updates[name] = replace(update, a=a, b=b)
    return replace(adapter, updates=updates)


def moved_from(adapter: Adapter, initial: Adapter) -> float:
    """Returns how far training moved the factors, relative to the initial ones: those of another run are far off."""
    moved = size = 0.0
    for name, update in adapter.updates.items():
        for one, other in ((update.a, initial.updates[name].a), (update.b, initial.updates[name].b)):
            moved += float((one.double() - other.double()).square().sum())
            size += float(other.double().square().sum())
    return relative(math.sqrt(moved), math.sqrt(size))


def check_start(base: nn.Module, initial: Adapter, start: str) -> None:
    """Refuses a PiSSA start of another base: A0, B0 must be singular directions of the base's weights.

    What they leave of a weight is orthogonal to them then. Other starts pass.

    Raises:
        ValueError: they are another base's.
    """
    if not start.startswith("pissa"):
        return
    for name, update in shown(initial.updates, "Comparing with the base"):
        weight = base.get_parameter(f"{name.removeprefix(PEFT_PREFIX)}.weight").detach().double()
        weight = weight.T if initial.config.fan_in_fan_out else weight
        a0, b0 = update.a.double(), update.b.double()
        part = update.scaling * b0 @ a0
        left = min(
            relative(float((b0.T @ (weight - part)).norm()), float((b0.T @ part).norm())),
            relative(float(((weight - part) @ a0.T).norm()), float((part @ a0.T).norm())),
        )  # a randomised start is exact from one side
        if left > NOT_A_START:
            raise ValueError(
                f"{name}: the initial adapter {initial.directory!r} holds no singular directions of this base "
                f"({left:.2g} off): it is another model's, or the residual base was given instead of the original one."
            )
