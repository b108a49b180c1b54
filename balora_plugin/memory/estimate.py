"""What a training step is asked to do, and the bytes that it takes: by part, at the moment when they are most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import RegularizerConfig

GIB = 2**30
MOMENTS = {
    "teacher": "the teacher's forward pass",
    "student": "the student's forward pass",
    "terms": "the terms",
    "backward": "the backward pass",
    "optimizer": "the optimizer's step",
}
PARTS = {
    "weights": "weights",
    "frozen_factors": "frozen factors A0, B0",
    "trained": "what trains",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "terms": "terms",
}


@dataclass(frozen=True)
class Workload:
    """What one training step does, as far as its memory depends on it.

    Attributes:
        rows, length: The micro-batch: sequences, and tokens of each.
        terms: The resolved settings of the terms.
        cached: The teacher's states are read from a cache.
        checkpointing: Activations are computed again in the backward pass.
        accumulates: An optimizer step takes several micro-batches, so gradients stay between them.
        optimizer: Its name, as transformers' `optim` has it.
        autocast: What autocast computes in; None without it.
        device_type: Where it runs: it decides how many logits exist at a time.
    """

    rows: int
    length: int
    terms: RegularizerConfig
    cached: bool = False
    checkpointing: bool = False
    accumulates: bool = False
    optimizer: str = "adamw_torch_fused"
    autocast: torch.dtype | None = None
    device_type: str = "cuda"


@dataclass(frozen=True)
class Held:
    """Bytes that a run holds all along: weights, A0 and B0, what trains, and what the optimizer keeps of that."""

    weights: int
    frozen_factors: int
    trained: int
    optimizer: int

    @property
    def total(self) -> int:
        """Returns their sum."""
        return self.weights + self.frozen_factors + self.trained + self.optimizer


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device at the moment when a training step takes most.

    Attributes:
        weights: The model's, quantised ones as they are stored, and buffers.
        frozen_factors: A0 and B0.
        trained: The parameters that train.
        optimizer: What the optimizer keeps.
        gradients: Those that exist at that moment.
        activations: Everything else that the passes hold then, teacher states included.
        terms: Buffers of the token terms and of the spectrum at that moment, and the head's factor all along. Logits of
            the whole batch never exist.
        moment: Which one it is, of MOMENTS.
        by_moment: {moment: total bytes then}.
        kept: What the student's forward pass keeps for the backward pass, by the class of the module that made it.
    """

    weights: int
    frozen_factors: int
    trained: int
    optimizer: int
    gradients: int
    activations: int
    terms: int
    moment: str
    by_moment: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Returns the sum of the parts."""
        return sum(getattr(self, name) for name in PARTS)

    def as_json(self) -> dict[str, Any]:
        """Returns the parts, their sum, and both tables, in bytes."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {
            **parts,
            "total": self.total,
            "moment": self.moment,
            "by_moment": {**self.by_moment},
            "kept": {**self.kept},
        }

    def in_words(self) -> str:
        """Returns the sum, the parts that are not negligible, and the moment, on one line."""
        parts = [f"{words} {gib(getattr(self, name))}" for name, words in PARTS.items() if getattr(self, name)]
        return f"{gib(self.total)} GiB in {MOMENTS[self.moment]}: {', '.join(parts)}"


def gib(count: int) -> str:
    """Returns bytes as GiB, with as many digits as say something."""
    value = count / GIB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
