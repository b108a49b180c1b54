"""A search over settings by the host's `hyperparameter_search` minds the task, not the terms that we log beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import default_compute_objective

from .log_keys import PREFIX

if TYPE_CHECKING:  # for type checkers a mixin over a Trainer
    from transformers import Trainer as _Base
else:
    _Base = object


def task_objective(metrics: dict[str, float]) -> float:
    """Returns the host's default objective of the metrics that are not BA-LoRA's own.

    The host takes `eval_loss` where nothing else was measured, and the sum of all else where something was: with our
    keys among them the terms' weights would decide.
    """
    return default_compute_objective({key: value for key, value in metrics.items() if PREFIX not in key})


class SearchesByTask(_Base):
    """Of a Trainer: its search has a default objective that leaves BA-LoRA's keys out."""

    def hyperparameter_search(
        self,
        hp_space: Any = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Searches as the host does; `compute_objective` left out is [`task_objective`]."""
        return super().hyperparameter_search(hp_space, compute_objective or task_objective, *args, **kwargs)
