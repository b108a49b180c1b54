"""The terms of a baseline: none, and none of what has no meaning without one."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import TERMS, RegularizerConfig

_NEEDS_A_TERM = ("drift_target", "balance", "schedule", "anchor_data", "teacher_cache", "teacher_cache_top_k")


def without_terms(config: RegularizerConfig) -> RegularizerConfig:
    """Returns the settings with every weight 0, and what would set or serve a weight left out; the rest as it is."""
    off: dict[str, Any] = {f"lambda_{name}": 0.0 for name in TERMS} | dict.fromkeys(_NEEDS_A_TERM)
    return dataclasses.replace(config, **off, head_warmup_steps=0)
