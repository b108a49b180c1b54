"""What is trained: the methods, the cheap rivals of a term, and which seeds each of them has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from balora_plugin import RegularizerConfig

from ..common.records import Cell
from ..common.terms import NO_TERMS

VISIBLE = {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02}
BUDGETS = (0.05, 0.1, 0.2)  # nats per counted token


def alone(**weight: float) -> dict[str, float]:
    """One term, the other two at 0."""
    return {**NO_TERMS, **weight}


def budget(nats: float) -> dict[str, float]:
    """Consistency alone, its weight found by the controller."""
    return {"lambda_diversity": 0.0, "lambda_svd": 0.0, "drift_target": nats}


@dataclass(frozen=True)
class Method:
    """`start` is PEFT's init_lora_weights, `terms` are RegularizerConfig's fields, `decay` is AdamW's weight decay.

    Decay pulls to the pre-trained model: LoRA's product B A to 0, and in delta form dA and dB. `anchors` are rows of
    text without labels for each row of the task, on which the consistency term is taken as well.
    """

    start: bool | str
    rate: float
    terms: Mapping[str, Any] = field(default_factory=lambda: NO_TERMS)
    decay: float = 0.0
    anchors: float = 0.0

    @property
    def is_rival(self) -> bool:
        """Whether it has no term: what a sceptic would do instead."""
        return not any(self.terms.get(name) for name in NO_TERMS) and not {"preset", "drift_target"} & set(self.terms)

    def can_run(self) -> bool:
        """Whether this version of the package knows all its settings."""
        return set(self.terms) <= set(RegularizerConfig.__dataclass_fields__)


# in the order in which they run: what matters most first, so that a study that is stopped is still a comparison
METHODS: dict[str, Method] = {
    "lora-1e-3": Method(True, 1e-3),
    "pissa-3e-4": Method("pissa", 3e-4),
    "pissa-cr0.3": Method("pissa", 3e-4, alone(lambda_consistency=0.3)),
    "lora-cr0.3": Method(True, 1e-3, alone(lambda_consistency=0.3)),
    "ba-iclr2026": Method("pissa", 3e-4, {"preset": "iclr2026"}),
    "lora-3e-4": Method(True, 3e-4),
    "pissa-1e-4": Method("pissa", 1e-4),
    "ba-paper": Method("pissa", 3e-4, {"preset": "paper"}),
    "ba-visible": Method("pissa", 3e-4, VISIBLE),
    "lora-visible": Method(True, 1e-3, VISIBLE),
    "lora-decay": Method(True, 1e-3, decay=30.0),
    "lora-cr1": Method(True, 1e-3, alone(lambda_consistency=1.0)),
    **{f"drift-{nats:g}": Method("pissa", 3e-4, budget(nats)) for nats in BUDGETS},
    "pissa-dr0.02": Method("pissa", 3e-4, alone(lambda_diversity=0.02)),
    "pissa-svd0.02": Method("pissa", 3e-4, alone(lambda_svd=0.02)),
    "pissa-decay": Method("pissa", 3e-4, decay=100.0),
    "pissa-cr1": Method("pissa", 3e-4, alone(lambda_consistency=1.0)),
    "lora-cr1-anchors": Method(True, 1e-3, alone(lambda_consistency=1.0), anchors=0.5),
    "pissa-cr0.3-anchors": Method("pissa", 3e-4, alone(lambda_consistency=0.3), anchors=0.5),
}


def cell(method: str, seed: int) -> Cell:
    """One run."""
    return Cell(f"{method}-s{seed}", {"method": method, "seed": seed})
