"""Multimodal models in ms-swift, which encodes a batch before the model's forward, in a hook of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...adapter.targets import injected_layers
from ...findings import Finding

KEYWORD = "ba_lora"  # by which the objective travels into the model's forward
Hook = Callable[[Any, Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def carrying(hook: Hook) -> Hook:
    """Returns a forward pre-hook that hands the objective past `hook`, which would drop it."""

    def carried(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        request = kwargs.pop(KEYWORD, None)
        args, kwargs = hook(model, args, kwargs)
        return args, kwargs if request is None else {**kwargs, KEYWORD: request}

    return carried


def of_multimodal(args: Any, model: Any, teacher_cache: Any) -> list[Finding]:
    """Finds what the teacher would see as the student does: the batch is encoded once, with the adapter on.

    Args:
        args: ms-swift's arguments.
        model: The bare model, with ms-swift's `model_meta`.
        teacher_cache: That of BA_LORA.
    """
    if not model.model_meta.is_multimodal:
        return []
    found = []
    linear = not isinstance(args.target_modules, str) and "all-linear" in args.target_modules
    for key in ("freeze_vit", "freeze_aligner"):
        if linear and not getattr(args, key):
            found.append(Finding(key, False, "adapts what encodes images for the teacher too", "write true", True))
    for name in args.modules_to_save:
        if name in ("all-embedding", "embed_tokens", "wte"):
            found.append(Finding("modules_to_save", name, "embeds tokens for the teacher too", "remove it", True))
    if teacher_cache is not None:
        why = "knows a document by its tokens, the same for every image"
        found.append(Finding("BA_LORA.teacher_cache", teacher_cache, why, "remove it", False))
    return found


def adapted_towers(model: Any) -> list[Finding]:
    """Finds layers with an adapter in what encodes images, which explicit targets may name."""
    meta = model.model_meta
    if not meta.is_multimodal or meta.model_arch is None:
        return []
    towers = tuple(f"{name}." for name in (*meta.model_arch.vision_tower, *meta.model_arch.aligner))
    names = [name for name, _ in injected_layers(model, "default") if name.startswith(towers)]
    why = f"match {names[0]}, which encodes images for the teacher too" if names else ""
    return [Finding("target_modules", None, why, "name layers of the language model alone", True)] if names else []
