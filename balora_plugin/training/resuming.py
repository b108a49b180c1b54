"""Where a run goes on from, and a run that has nothing left to do."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, has_length

from ..adapter.config import active_config, our_adapters
from ..adapter.saved.fit import check_checkpoint_fits
from ..checkpoint.integrity import check_whole, trained_settings, unchecked
from ..checkpoint.names import STATE_FILE
from ..settings import as_path
from .checkpoints import run_settings
from .checks.arguments import check_checkpoint, check_kind
from .host import HostTrainer
from .run_state import RunState


def asked_for(host: HostTrainer, resume_from_checkpoint: Any, *, fresh_optimizer: bool = False) -> str | None:
    """Returns the checkpoint that `train()` is asked to go on from, a path as text; None for none.

    `True` is the last one in the output directory; where there is none the host says so.

    Raises:
        ValueError: `fresh_optimizer` without a checkpoint, or under an engine that loads weights and optimizer in one.
    """
    if resume_from_checkpoint is True:
        checkpoint = get_last_checkpoint(str(host.args.output_dir))
    else:
        checkpoint = as_path("resume_from_checkpoint", resume_from_checkpoint or None)
    if fresh_optimizer and checkpoint is None:
        raise ValueError(
            "fresh_optimizer=True without a checkpoint to resume: name it in resume_from_checkpoint, or leave "
            "fresh_optimizer out."
        )
    if fresh_optimizer and host.is_deepspeed_enabled:
        raise ValueError(
            "fresh_optimizer=True does not work with DeepSpeed, which loads weights and optimizer together: begin a "
            f"new run with balora_plugin.BaLoraModel.from_pretrained(base, {checkpoint!r}, is_trainable=True)."
        )
    return checkpoint


def optimizer_begins_anew(host: HostTrainer, checkpoint: str | None, *, fresh_optimizer: bool) -> bool:
    """Returns whether nothing of the optimizer is to be loaded; its schedule is then taken to the checkpoint's step.

    Raises:
        ValueError: the checkpoint holds the state of another kind of optimizer, of which no step can be made.
    """
    if checkpoint is None:
        return False
    if fresh_optimizer:
        advance(host.lr_scheduler, host.state.global_step)
        return True
    before, now = trained_settings(checkpoint), run_settings(host)
    kinds = before.get("optimizer"), now["optimizer"]
    if None not in kinds and kinds[0] != kinds[1] and not host.is_deepspeed_enabled:
        raise ValueError(
            f"{checkpoint} holds the state of {kinds[0]} (optim={before.get('optim')!r}), and this run's optimizer is "
            f"{kinds[1]} (optim={now['optim']!r}): write the optimizer of the run that was begun (Axolotl: optimizer), "
            "or train(resume_from_checkpoint=..., fresh_optimizer=True), which begins with an empty state."
        )
    return False


def advance(scheduler: Any, steps: int) -> None:
    """Takes a fresh learning-rate schedule to where it is after so many steps, unless a metric leads it."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's would step once a process
    if isinstance(scheduler, ReduceLROnPlateau):
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
        for _ in range(steps):
            scheduler.step()


def check_resumable(host: HostTrainer, run: RunState | None, checkpoint: str, *, fresh_optimizer: bool = False) -> None:
    """Refuses a checkpoint that training cannot be resumed from exactly, or of another kind of adapter.

    `fresh_optimizer`: exactly but for the optimizer's state and the random states.

    Raises:
        ValueError: names the file and the last whole checkpoint.
    """
    check_checkpoint(active_config(host.model), checkpoint)
    if run is not None:
        check_kind(host.model, checkpoint)
    ours = our_adapters(host.model)
    if run is None and not ours:
        return
    check_whole(checkpoint, ours, fresh_optimizer=fresh_optimizer)
    check_checkpoint_fits(host.model, checkpoint, ours)
    if run is None:
        return
    note = unchecked(checkpoint)
    if note is not None:
        run.warn("unchecked", note)


def position(host: HostTrainer, checkpoint: str | None, trained: tuple[int, int]) -> tuple[int, int]:
    """Returns the passes over the data that a run has ended, and the micro-batches of the one that it is in.

    `trained`: the host's own answer, which takes a stream (data without a length) for one pass that never ends; after
    its first it would skip what is not there, and begin the pass at hand anew. The epoch that a checkpoint keeps says
    where it was: whole passes, and the part of the longest that there could be, max_steps steps.
    """
    args = host.args
    if checkpoint is None or has_length(host.train_dataset) or getattr(args, "ignore_data_skip", False):
        return trained
    state = json.loads(Path(checkpoint, STATE_FILE).read_text(encoding="utf-8"))
    epoch = state.get("epoch") or 0.0
    if epoch <= 1.0:  # in the first
        return trained
    passes = int(epoch)
    return passes, round((epoch - passes) * state["max_steps"] * args.gradient_accumulation_steps)


class NothingLeft(TrainerCallback):
    """Keeps a run that is resumed after its last step from training on: the host takes a step before it looks.

    `run.finished` says so to the trainer, which then gives the host no batches.
    """

    def __init__(self, run: RunState) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._run.finished = self._run.resumed is not None and state.global_step >= state.max_steps
        if self._run.finished:
            self._run.warn(
                "finished",
                f"{self._run.resumed} is at step {state.global_step} of {state.max_steps}: this run has "
                "ended, and nothing is trained. To go on, raise max_steps or num_train_epochs.",
            )
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run.finished:  # what the host does at the end of an epoch is done
            control.should_log = control.should_save = control.should_evaluate = False


class Resumed(TrainerCallback):
    """Has a resumed run's best checkpoint be one of its own: the host keeps an absolute path, and runs are moved.

    Where the directory was, another run may be by now, whose weights would be loaded at the end. Says where the order
    of the data is not that of the uninterrupted run: a sampler by length draws it anew in every pass.
    """

    def __init__(self, run: RunState) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best, checkpoint = state.best_model_checkpoint, self._run.resumed
        if checkpoint is None:
            return
        if getattr(args, "train_sampling_strategy", None) == "group_by_length" and (state.epoch or 0.0) > 1.0:
            self._run.warn(
                "order",
                "train_sampling_strategy='group_by_length' (Axolotl: group_by_length) draws the order of each pass as "
                f"it begins, which {checkpoint} does not hold: the rest of this pass has other rows than the "
                "uninterrupted run's. 'random', the default, is exact.",
            )
        if best is None:
            return
        here = Path(os.path.realpath(checkpoint)).parent
        if Path(os.path.realpath(best)).parent == here:
            return
        found = here / Path(best).name
        state.best_model_checkpoint = str(found) if found.is_dir() else None
        if not found.is_dir():
            state.best_metric = None
            self._run.warn(
                "best",
                f"the best checkpoint so far was {best}, which does not stand beside {checkpoint}: it is left out, and "
                "the best of the steps from here on is kept.",
            )
