"""Refusals of what was changed between the making of a trainer and its training: it would be recorded, and not act."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from ...adapter.config import BaLoraConfig
from ...config import RegularizerConfig

# of a LoraConfig what its layers were made by, and what their scaling is saved by
_OF_LAYERS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "compile",
)


@dataclass(frozen=True)
class AsMade:
    """What a trainer read of its settings when it was made.

    Attributes:
        source: The terms as they were given, which an adapter of ours records.
        terms: Those in force then, as plain values.
        adapter: The active adapter's config; None without one, or where it is no LoRA.
        layers: What its layers were made by.
    """

    source: RegularizerConfig
    terms: dict[str, Any]
    adapter: LoraConfig | None
    layers: dict[str, Any]

    @classmethod
    def of(cls, source: RegularizerConfig, config: RegularizerConfig, adapter: Any) -> AsMade:
        """Keeps copies; `config`: `source`, every setting resolved for the model."""
        lora = adapter if isinstance(adapter, LoraConfig) else None
        return cls(source, config.to_dict(), lora, copy.deepcopy(_layers(lora)))

    def check(self, config: RegularizerConfig, adapter: Any) -> None:
        """Refuses terms, or a LoRA's own settings, that differ now; `config`: trainer.ba_lora; `adapter`: the active.

        Raises:
            ValueError: names each with the old and the new value.
        """
        places = {"trainer.ba_lora": config, "regularizers": self.source.resolved(config.task)}
        if isinstance(adapter, BaLoraConfig):
            places["the active adapter's regularizers"] = adapter.regularizers.resolved(config.task)
        for where, terms in places.items():
            _refuse(where, self.terms, terms.to_dict(), "make the trainer after")
        if adapter is self.adapter:
            _refuse(f"the {type(adapter).__name__}", self.layers, _layers(self.adapter), "make the adapter after")


def _layers(config: LoraConfig | None) -> dict[str, Any]:
    keys = set(_OF_LAYERS) - ({"rank_pattern"} if str(getattr(config, "peft_type", "")).endswith("ADALORA") else set())
    return {key: getattr(config, key) for key in _OF_LAYERS if key in keys and hasattr(config, key)}


def _refuse(where: str, before: dict[str, Any], now: dict[str, Any], remedy: str) -> None:
    changed = [f"{key} {before[key]!r} -> {now[key]!r}" for key in now if before[key] != now[key]]
    if changed:
        raise ValueError(
            f"{', '.join(changed)}: changed in {where} after the trainer was made, which had read it: it would be "
            f"recorded and not act. Set it back, or {remedy} the change."
        )
