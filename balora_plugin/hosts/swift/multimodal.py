"""Multimodal models in ms-swift, which encodes a batch before the model's forward, in a hook of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...adapter.delta import PEFT_PREFIX
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
    if teacher_cache is not None:
        why = "knows a document by its tokens, the same for every image"
        found.append(Finding("BA_LORA.teacher_cache", teacher_cache, why, "remove it", False))
    return found


def trained_encoders(model: Any) -> list[Finding]:
    """Finds what trains in a wrapped model although it encodes images, or embeds tokens, before the forward.

    Args:
        model: With the adapter on, and ms-swift's `model_meta`; every parameter that trains is looked at, whichever
            setting named its module.
    """
    meta = model.model_meta
    if not meta.is_multimodal:
        return []
    arch = meta.model_arch
    towers = () if arch is None else tuple(f"{name}." for name in (*arch.vision_tower, *arch.aligner))
    embeddings = _embeddings(model.get_base_model())
    found: dict[tuple[str, str], Finding] = {}
    for name, parameter in model.named_parameters():
        path = name.removeprefix(PEFT_PREFIX)
        if not parameter.requires_grad or not (path.startswith(towers) or id(parameter) in embeddings):
            continue
        key = "modules_to_save" if ".modules_to_save." in path else "target_modules"
        what = "encodes images" if path.startswith(towers) else "embeds tokens"
        layer = path.partition(".modules_to_save.")[0].partition(".lora_")[0]
        why = f"match {layer}, which {what} for the teacher too"
        found.setdefault((key, what), Finding(key, None, why, "name layers of the language model alone", True))
    return list(found.values())


def _embeddings(base: Any) -> frozenset[int]:
    try:
        return frozenset(map(id, base.get_input_embeddings().parameters()))
    except (NotImplementedError, AttributeError):  # a model's own code, which does not say
        return frozenset()
