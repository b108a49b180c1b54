"""Of a multimodal model the language model is adapted, and what stands beside it where that is asked for by name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.utils import logging

from ..pretrained.backbone import beside_the_language_model, is_multimodal
from .config import BaLoraConfig
from .excluding import any_of, exclude, excluded_pattern
from .target_names import takes

logger = logging.get_logger(__name__)


def leave_towers_out(config: BaLoraConfig, model: Any) -> None:
    """Keeps an adapter (its config, in place) off what stands beside a multimodal model's language model.

    Towers have layers of the same names (q_proj), so that "all-linear", PEFT's defaults and most lists of names match
    there too. Left as they are written: a regular expression, and a name that is found beside the language model alone,
    also where a shorter one of the list matches the same layer.
    What is left out is said, in one line, and stands in `exclude_modules`, so that PEFT leaves it out again when it
    loads the adapter.
    """
    towers = beside_the_language_model(model) if is_multimodal(model) else []
    wanted = config.target_modules
    if not towers or (isinstance(wanted, str) and wanted.lower() != INCLUDE_LINEAR_LAYERS_SHORTHAND):
        return
    own = excluded_pattern(config.exclude_modules)
    modules = {name: module for name, module in model.named_modules() if not (own and re.fullmatch(own, name))}
    there = [name for name in modules if _is_inside(name, towers)]
    if isinstance(wanted, str):
        left_out = [name for name in there if isinstance(modules[name], nn.Linear)]
        pattern = rf"(?:{any_of(towers)})(?:\..*)?"
    else:
        here = [name for name in modules if not _is_inside(name, towers)]
        asked = sorted(wanted or _defaults(model))
        shared = [name for name in asked if any(takes(full, name) for full in here)]
        left_out, but = _left_out(there, shared, [name for name in asked if name not in shared])
        pattern = rf"{but}(?:{any_of(towers)})\.(?:.*\.)?(?:{any_of(shared)})"
    if not left_out:
        return
    exclude(config, pattern)
    logger.warning(
        f"BA-LoRA: of {type(model).__name__} the language model is adapted; {len(left_out)} layers of "
        f"{', '.join(towers)} that target_modules matches too, and that PEFT's own LoRA would adapt, stay as they "
        "are. To adapt them as well, write a regular expression that matches them, or their full names."
    )


def _left_out(there: list[str], shared: list[str], own: list[str]) -> tuple[list[str], str]:
    """Of the layers in towers those to be left out, and a lookahead that keeps a pattern off those asked for.

    `shared`: the names that the language model has too; `own`: those that it has not, which ask for what they match.
    """
    matched = [full for full in there if any(takes(full, name) for name in shared)]
    asked = [name for name in own if any(takes(full, name) for full in matched)]
    left_out = [full for full in matched if not any(takes(full, name) for name in asked)]
    return left_out, rf"(?!(?:.*\.)?(?:{any_of(asked)})$)" if asked else ""


def _is_inside(name: str, towers: Iterable[str]) -> bool:
    return any(name == tower or name.startswith(f"{tower}.") for tower in towers)


def _defaults(model: nn.Module) -> list[str]:
    """What PEFT adapts of this type of model where no targets are given."""
    config: Any = model.config
    return list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.model_type, []))
