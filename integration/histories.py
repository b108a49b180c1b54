"""What runs have logged, as far as two runs of the same numbers have it in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from balora_plugin.training.log_keys import LOG_KEYS, PREFIX

COST = {PREFIX + name for name, key in LOG_KEYS.items() if key.where == "end"}  # seconds and bytes, not numbers


def rows_of(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The losses and BA-LoRA's keys of every row of a log, what a run has cost aside."""
    return [
        {key: value for key, value in row.items() if (key == "loss" or "balora" in key) and key not in COST}
        for row in log
    ]
