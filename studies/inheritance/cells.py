"""What is trained: the models with their faults, the methods, and the order in which their cells run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ..common.records import Cell
from ..common.terms import NO_TERMS

TINY_FAULTS = ("clean", "noise", "imbalance")
COLOUR = "colour"  # the fault of the larger model


def alone(term: str, weight: float | None = None) -> dict[str, Any]:
    """One term, by default at `iclr2026`'s weight; the other two at 0."""
    off = {name: 0.0 for name in NO_TERMS if name != f"lambda_{term}"}
    return {"preset": "iclr2026", **off} if weight is None else {**off, f"lambda_{term}": weight}


@dataclass(frozen=True)
class Method:
    """`start`: PEFT's init_lora_weights, None for full fine-tuning; `terms`: RegularizerConfig's fields.

    `tiny`, `large`: learning rates for the two models: the quickstart's, and those of studies/forgetting.
    """

    start: bool | str | None
    terms: Mapping[str, Any] = field(default_factory=lambda: NO_TERMS)
    tiny: float = 1e-3
    large: float = 3e-4


METHODS: dict[str, Method] = {
    "lora": Method(True, large=1e-3),
    "pissa": Method("pissa"),
    "ba-paper": Method("pissa", {"preset": "paper"}),
    "ba-iclr2026": Method("pissa", {"preset": "iclr2026"}),
    "consistency-0.3": Method("pissa", alone("consistency", 0.3)),
    "full": Method(None, tiny=5e-4, large=3e-5),
    "consistency": Method("pissa", alone("consistency")),
    "diversity": Method("pissa", alone("diversity")),
    "svd": Method("pissa", alone("svd")),
}


def cells(faults: Sequence[str], seeds: Sequence[int], methods: Sequence[str]) -> list[Cell]:
    """Seed by seed, all faults and methods: a study that is stopped is a comparison."""
    return [
        Cell(f"{fault}-{method}-s{seed}", {"fault": fault, "method": method, "seed": seed})
        for seed, fault, method in product(seeds, faults, methods)
    ]


def base_cell(fault: str) -> Cell:
    """The model with its fault before any fine-tuning."""
    return Cell(f"{fault}-base", {"fault": fault, "method": "base", "seed": 0})
