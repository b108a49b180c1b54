"""The fine-tuning methods that the quickstart compares, all of one adapter shape, and what a trained one is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from balora_plugin.config import RECOMMENDED

RANK = 16  # and alpha
TERM_PREFIX = "balora/"
SHARE_INTERVAL = 10  # steps between two measurements of the terms' gradients


@dataclass(frozen=True)
class Method:
    """One row of the comparison: `key` names it on the command line and as a folder, `label` in the table.

    `start` is PEFT's `init_lora_weights`; `terms` are BA-LoRA's settings, None for stock LoRA and PiSSA.
    """

    key: str
    label: str
    start: str | bool
    terms: Mapping[str, Any] | None = None

    @property
    def has_terms(self) -> bool:
        """Whether a term acts: BA-LoRA's adapter alone, without one, is PiSSA's start in a plain LoRA's file."""
        return any(value for key, value in (self.terms or {}).items() if key.startswith(("lambda_", "preset")))

    @property
    def is_ba_lora(self) -> bool:
        """Whether it has BA-LoRA's adapter and terms."""
        return self.terms is not None

    @property
    def fits_untouched_base(self) -> bool:
        """Whether the saved adapter leaves the base as it is; stock PiSSA's takes its start out of the weights."""
        return self.is_ba_lora or self.start != "pissa"


METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        Method("lora", "LoRA", True),
        Method("pissa", "PiSSA", "pissa"),
        Method("pissa-delta", "PiSSA", "pissa", dict.fromkeys(RECOMMENDED, 0.0)),
        Method("ba-lora", "BA-LoRA", "pissa", RECOMMENDED),
        Method("ba-lora-paper", "BA-LoRA (paper)", "pissa", {"preset": "paper"}),
        Method("ba-lora-iclr2026", "BA-LoRA (iclr2026)", "pissa", {"preset": "iclr2026"}),
        Method(
            "ba-lora-visible",
            "BA-LoRA (visible)",
            "pissa",
            {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02},
        ),
    )
}


@dataclass(frozen=True)
class TrainedRun:
    """A fine-tuned model, its saved adapter, the seconds of training and the last logged loss terms.

    `model` is the one that was trained or, where another process trained it (`host_task_loss` is then the held-out
    task loss that this process measured on its own model), the saved adapter loaded by plain PEFT on a fresh base.
    `logged_terms` is empty without regularisers; its `balora/share_*` are the norms of the weighted terms' gradients
    over that of the task's.
    """

    model: PeftModel
    adapter: Path
    seconds: float
    logged_terms: dict[str, float]
    host_task_loss: float | None = None
    seconds_per_step: float | None = None

    def largest_share(self) -> float | None:
        """The strongest regulariser's gradient relative to the task's, None without regularisers."""
        shares = [value for name, value in self.logged_terms.items() if name.startswith(f"{TERM_PREFIX}share_")]
        return max(shares, default=None)


def last_logged(history: Sequence[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Last value of every logged quantity whose name starts with `prefix`."""
    return {
        name: float(value)
        for entry in history
        for name, value in entry.items()
        if name.startswith(prefix) and isinstance(value, (int, float))
    }
