"""Liger's kernels in transformers' trainers: those of the layers are used, its losses are superseded by the terms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

LOSSES = ("fused_linear_cross_entropy", "cross_entropy")  # of a liger_kernel_config


def without_losses(args: Any, warn: Callable[[str, str], None]) -> Any:
    """Returns a trainer's arguments with Liger's losses switched off, which would replace the forward of the terms.

    Said once by `warn`. The caller's own arguments stay as they are: a copy takes their place, where there is anything
    to switch off. Norms, rotary embeddings and MLPs stay Liger's, and train the same.
    """
    if not getattr(args, "use_liger_kernel", False):
        return args
    args = copy.copy(args)
    args.liger_kernel_config = {**(args.liger_kernel_config or {}), **dict.fromkeys(LOSSES, False)}
    warn(
        "liger",
        "use_liger_kernel=True: Liger's layers are used, and its fused loss is switched off, in whose place the loss "
        "here never makes full logits either.",
    )
    return args


def give_kernels(model: Any, args: Any) -> None:
    """Puts the kernels of a trainer's model on a second one, its teacher, so that no rounding counts as distance."""
    if getattr(args, "use_liger_kernel", False):
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, args.liger_kernel_config)
