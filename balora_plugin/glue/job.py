"""One run of `balora glue`: task, method, seed and settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from ..config import RegularizerConfig
from .recipe import Settings


@dataclass(frozen=True)
class Job:
    """What one run is: everything its result depends on, but for the software and what a model's name stands for.

    `data`: the digest of its JSONL files, or "hub".
    """

    task: str
    method: str
    model: str
    learning_rate: float
    seed: int
    settings: Settings
    regularizers: RegularizerConfig
    limit: int = 0
    data: str = "hub"

    def to_dict(self) -> dict[str, Any]:
        """Returns its fields, JSON-ready."""
        values = dataclasses.asdict(self)
        values["settings"]["learning_rates"] = None  # of the grid, its own alone
        return values

    @property
    def file(self) -> str:
        """Returns the name of its result's file."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.task}-{self.method}-{self.learning_rate:g}-{self.seed}-{digest}.json"
