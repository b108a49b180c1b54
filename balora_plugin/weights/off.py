"""Terms switched off: their weights, and what has no meaning without them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..config import TERMS, RegularizerConfig

_OF_CONSISTENCY = ("drift_target", "anchor_data", "anchor_fraction", "teacher_cache", "teacher_cache_top_k")


def switched_off(values: Mapping[str, Any], terms: Collection[str]) -> dict[str, Any]:
    """Returns settings by name with the weights of `terms` 0, and what would set or serve one left out."""
    left = dict(values)
    dropped = [*_OF_CONSISTENCY] if "consistency" in terms else []
    if "consistency" in terms and left.get("schedule") == "adaptive":
        dropped.append("schedule")
    if not set(TERMS) - set(terms):
        dropped += ["schedule", "head_warmup_steps"]
    if isinstance(shares := left.get("balance"), dict):
        left["balance"] = {name: share for name, share in shares.items() if name not in terms}
        dropped += [] if left["balance"] else ["balance"]
    for key in dropped:
        left.pop(key, None)
    return left | {f"lambda_{name}": 0.0 for name in terms}


def without_terms(config: RegularizerConfig) -> RegularizerConfig:
    """Returns the settings of a baseline: every weight 0, and what would set or serve a weight left out."""
    return RegularizerConfig.from_dict(switched_off(vars(config), TERMS))
