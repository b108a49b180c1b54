"""Refusals of a run whose teacher would not be the pre-trained model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ...adapter.config import BaLoraConfig
from ...adapter.options import NEUTRAL_OPTIONS
from ...pretrained.classifier_head import is_classifier, teacher_head

# starts that rewrite the base weights: switching such an adapter off gives a residual model, not the pre-trained one
MUTATING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_teacher(
    adapter: Any, teacher_model: nn.Module | None, *, cached: bool = False, model: nn.Module | None = None
) -> None:
    """Refuses a consistency term whose teacher would not be the pre-trained model.

    `cached`: a teacher_cache is filled before the weights move, which is enough in full fine-tuning. `model`: the base
    model with its adapters, where there is one already.

    Raises:
        ValueError: there is no pre-trained model to be had; names the setting and what to pass.
    """
    if teacher_model is not None or (adapter is None and cached):
        return
    if adapter is None:
        cache = "" if is_classifier(model) else " set teacher_cache=<a directory> (filled before the first step),"
        raise ValueError(
            "lambda_consistency > 0 in full fine-tuning has no adapter to switch off for the teacher: pass "
            f"teacher_model=<the pre-trained model>,{cache} or set lambda_consistency=0."
        )
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(f"{type(adapter).__name__} cannot be switched off for the teacher: pass teacher_model=...")
    if model is not None:
        _check_frozen_base(model)
    if isinstance(adapter, BaLoraConfig):
        return
    start = str(getattr(adapter, "init_lora_weights", "")).lower()
    if start.startswith(MUTATING_STARTS):
        raise ValueError(
            f"init_lora_weights={start!r} rewrites the base weights, so switching the adapter off gives its residual "
            "model, not the pre-trained one: use BaLoraConfig (the same start in delta form), or pass teacher_model=..."
        )
    for key in ("bias", "trainable_token_indices"):
        neutral = NEUTRAL_OPTIONS[key]
        if getattr(adapter, key, neutral.value) not in (neutral.value, None):
            raise ValueError(
                f"{key}={getattr(adapter, key)!r} trains base parameters that the teacher shares: pass "
                f"teacher_model=..., or {neutral.remedy}."
            )


def _check_frozen_base(model: nn.Module) -> None:
    """Refuses base parameters that train beside the adapter: the teacher, which shares them, would move with them.

    Adapters, and the copies that modules_to_save trains, are switched off for the teacher; what they stand on is not.
    """
    switched_off: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            kept = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kept = module.original_module
        else:
            continue
        switched_off |= {id(p) for p in module.parameters()} - {id(p) for p in kept.parameters()}
    moving = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in switched_off]
    if moving:
        more = f" and {len(moving) - 1} more" if len(moving) > 1 else ""
        owner = moving[0].rpartition(".")[0].removesuffix(".base_layer").rpartition(".")[2]
        raise ValueError(
            f"{moving[0]}{more} trains beside the adapter: with the adapter switched off the model would not be the "
            f"pre-trained one any more. Freeze it (requires_grad_(False)), train a copy of its module "
            f"(modules_to_save=[{owner!r}]), pass teacher_model=..., or set lambda_consistency=0."
        )


def check_same_head(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuses a second classifier as teacher whose head is not the student's first one.

    Raises:
        ValueError: names the tensor and the remedy.
    """
    theirs = teacher_head(teacher) if is_classifier(teacher) else {}
    for name, value in teacher_head(model).items():
        if name not in theirs or theirs[name].shape != value.shape or not torch.equal(theirs[name].to(value), value):
            raise ValueError(
                f"teacher_model has another head than the model ({name}): consistency would measure the distance of "
                "two random heads. Pass copy.deepcopy(model), or load both from one directory that holds the head."
            )
