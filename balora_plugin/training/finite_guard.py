"""Stops training at a term that is NaN or inf, before anything of it is logged or saved."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..adapter.config import our_adapters
from ..checkpoint.integrity import last_whole
from .host import HostTrainer
from .run_state import RunState


class FiniteGuard(TrainerCallback):
    """Looks where the device is waited for anyhow: before a log, an evaluation or a checkpoint.

    Raises:
        FloatingPointError: names the term, the step and the last whole checkpoint; on every rank at once.
    """

    def __init__(self, run: RunState, host: HostTrainer) -> None:
        self._run, self._host = run, host

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if last or control.should_log or control.should_save or control.should_evaluate:
            self._look()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_save or control.should_evaluate:
            self._look()

    def _look(self) -> None:
        found = self._run.metrics.first_bad(self._host.accelerator.gather)
        if found is None:
            return
        name, step = found
        whole = last_whole(str(self._host.args.output_dir), our_adapters(self._host.model))
        what = "the task loss" if name == "task" else f"the {name} term (lambda_{name})"
        raise FloatingPointError(
            f"balora/{name}: {what} was NaN or inf at step {step}. Training was stopped, nothing was saved after it. "
            + (f"Resume from {whole}" if whole else "Start again")
            + " with a lower learning_rate or max_grad_norm; if it comes back at the same step, look at that batch."
        )
