"""Where a run goes on from, and a run that has nothing left to do."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..adapter.config import our_adapters
from ..checkpoint.integrity import check_whole, unchecked
from ..settings import as_path
from .checks.arguments import check_checkpoint
from .classification import restore_head
from .host import HostTrainer
from .run_state import RunState, active_config


def asked_for(resume_from_checkpoint: Any, output_dir: Any) -> str | None:
    """Returns the checkpoint that `train()` is asked to go on from, a path as text; None for none.

    `True` is the last one in `output_dir`; where there is none the host says so.
    """
    if resume_from_checkpoint is True:
        return get_last_checkpoint(str(output_dir))
    return as_path("resume_from_checkpoint", resume_from_checkpoint or None)


def check_resumable(host: HostTrainer, run: RunState | None, checkpoint: str) -> None:
    """Refuses a checkpoint that training cannot be resumed from exactly, or of another kind of adapter.

    Raises:
        ValueError: names the file and the last whole checkpoint.
    """
    check_checkpoint(active_config(host.model), checkpoint)
    ours = our_adapters(host.model)
    if run is None and not ours:
        return
    check_whole(checkpoint, ours)
    if run is None:
        return
    restore_head(run, checkpoint)
    note = unchecked(checkpoint)
    if note is not None:
        run.warn("unchecked", note)


class NothingLeft(TrainerCallback):
    """Keeps a run that is resumed after its last step from training on: the host takes a step before it looks.

    `run.finished` says so to the trainer, which then gives the host no batches.
    """

    def __init__(self, run: RunState, resumed: str | None) -> None:
        self._run, self._resumed = run, resumed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.finished = self._resumed is not None and state.global_step >= state.max_steps
        if self._run.finished:
            self._run.warn(
                "finished",
                f"{self._resumed} is at step {state.global_step} of {state.max_steps}: this run has "
                "ended, and nothing is trained. To go on, raise max_steps or num_train_epochs.",
            )
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run.finished:  # what the host does at the end of an epoch is done
            control.should_log = control.should_save = control.should_evaluate = False
