"""Moves a run's own weights after each optimizer step, keeps them in its checkpoints, says what they cannot hold."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .host import HostTrainer
from .own_weights import OwnWeights
from .run_state import RunState

STATE_KEY = "ba_lora_weights"  # in trainer_state.json, which the manifest of a checkpoint covers


class SettingWeights(TrainerCallback):
    """Gives the rules what each step measured.

    Their state lies in the host's own trainer state, so that every rank of a resumed run reads it with the step.
    """

    def __init__(self, run: RunState, host: HostTrainer) -> None:
        self._run, self._host = run, host
        self._moved = False

    @property
    def _own(self) -> OwnWeights:
        return self._run.own

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._own.begin(state.max_steps)
        self._moved = state.global_step > 0
        kept = state.stateful_callbacks.get(STATE_KEY)
        missing = self._own.load(kept or {}) if state.global_step else []
        if missing:
            self._run.warn(
                "weights_anew",
                f"{', '.join(missing)}: the checkpoint was written without it, so its weights start anew.",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        own = self._own
        measured = own.observe(self._host.accelerator.reduce)
        if not self._moved and measured.drift:  # 0 until a step has moved something; below 1e-9 it is rounding
            self._moved = measured.drift > 1e-9
            self._say("drift_target", own.first_step(measured) if self._moved else None)
        self._findings(ended=False)
        state.stateful_callbacks[STATE_KEY] = own.state()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._run.finished:
            self._findings(ended=True)

    def _findings(self, *, ended: bool) -> None:
        for key, rule in self._own.rules.items():
            self._say(key, rule.finding(ended=ended))

    def _say(self, key: str, finding: str | None) -> None:
        if finding is not None:
            self._run.warn(key, finding)
