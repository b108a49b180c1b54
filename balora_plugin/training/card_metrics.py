"""What a run has measured last, kept with its model for the model card of whatever is saved of it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..adapter.saved import provenance
from .log_keys import PREFIX, known_key
from .run_state import RunState

_OF_SPEED = ("_runtime", "_per_second", "_seconds_per_step", "_time")


class CardMetrics(TrainerCallback):
    """Notes the losses and terms of the last log, and everything that the last evaluation measured."""

    def __init__(self, run: RunState) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = provenance.known(self._run.wrapped)
        if found is not None:
            found.measured.clear()  # of an earlier training of this model
        for row in state.log_history:  # of the run that is resumed
            self._note(row, row.get("step", 0))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._note(logs or {}, state.global_step)

    def _note(self, logs: dict[str, Any], step: int) -> None:
        found = provenance.known(self._run.wrapped)
        shown = {key: float(value) for key, value in logs.items() if _is_shown(key, value)}
        if found is None or not shown:
            return
        evaluated = any(key.startswith("eval_") for key in shown)
        kept = {key: value for key, value in found.measured.items() if key.startswith("eval_") != evaluated}
        found.measured.clear()  # in place: what is known of a model that was cast since shares it
        found.measured.update({**kept, **shown, "step": float(step)})


def _is_shown(key: str, value: Any) -> bool:
    """Whether a log's value says something of the model, not of the machine or of settings."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if PREFIX in key:
        known = known_key(key)
        return known is not None and known.where in ("both", "eval")
    return key == "loss" or (key.startswith("eval_") and not key.endswith(_OF_SPEED))
