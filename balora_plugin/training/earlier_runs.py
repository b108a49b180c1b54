"""What a run says of those before it: checkpoints in its output directory, terms that the resumed one began with."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback

from ..checkpoint.integrity import checkpoints_in, trained_rows, trained_settings, trained_terms
from ..checkpoint.names import STATE_FILE
from ..config import RegularizerConfig
from .checkpoints import OF_THE_OPTIMIZER, run_settings, step_rows
from .host import HostTrainer
from .run_state import RunState

# what changes nothing of what is trained: where outputs are kept, how often shares are measured
_NEUTRAL = ("task", "share_interval", "teacher_cache", "teacher_pass")


class ResumingHost(HostTrainer, Protocol):
    """A Trainer with the mixin, as it resumes."""

    ba_lora_fresh_optimizer: bool


class EarlierRuns(TrainerCallback):
    """Says, when training begins, which checkpoints in its output directory are others', and what changed since."""

    def __init__(self, run: RunState, host: ResumingHost) -> None:
        self._run, self._host = run, host

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self._run
        if not state.is_world_process_zero or run.finished:
            return
        others = others_checkpoints(args.output_dir, run.resumed)
        if others:
            run.warn("earlier_run", _earlier(args.output_dir, others, run.resumed))
        if run.resumed is not None:
            self._say_changes(run.resumed, args)

    def _say_changes(self, resumed: str, args: Any) -> None:
        """Says once what the checkpoint that is resumed was trained with, and this run is not."""
        warn = self._run.warn
        changed = changed_terms(resumed, self._run.config)
        if changed:
            warn(
                "other_terms",
                f"{resumed} was trained with other terms than this run has: {_listed(changed)}. From here on the new "
                "ones count; write the old ones to have the run that was begun.",
            )
        resized = changed_rows(resumed, step_rows(args))
        if resized:
            warn(
                "other_rows",
                f"{resumed} was trained with steps of another size: {_listed(resized)}. The host counts the rows that "
                "were seen in steps of the new size: some come twice in this pass, or not at all, and a schedule by "
                "epochs moves. Write the old ones (or others of the same product) to have the run that was begun.",
            )
        other = changed_settings(resumed, run_settings(self._host))
        kept = {
            key: other.pop(key) for key in OF_THE_OPTIMIZER if key in other and not self._host.ba_lora_fresh_optimizer
        }
        if other:
            warn(
                "other_settings",
                f"resumes with other {', '.join(other)} than {resumed} was trained with: {_listed(other)}. From here "
                "on the new ones count; write the old ones to have the run that was begun.",
            )
        if kept:
            warn(
                "kept_settings",
                f"resumes with other {', '.join(kept)} than {resumed} was trained with: {_listed(kept)}. The old ones "
                "go on, which are a part of the optimizer's state; fresh_optimizer=True in train() takes the new ones.",
            )


def _listed(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items())


def changed_settings(checkpoint: str, now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {argument: (then, now)} of what else a run is made by; nothing where the checkpoint does not say.

    The class of the optimizer is looked at where its state is loaded.
    """
    before = trained_settings(checkpoint)
    shared = [key for key in now if key in before and key != "optimizer"]
    return {key: (before[key], now[key]) for key in shared if before[key] != now[key]}


def others_checkpoints(output_dir: str, resumed: str | None) -> list[str]:
    """Returns the finished checkpoints in `output_dir` that a run does not go on from, by step.

    Those are all of them, or, for a run that resumes one of them, those of later steps. One that a crash cut short is
    none: nothing resumes from it.
    """
    every = checkpoints_in(output_dir)
    found = {step: path for step, path in every.items() if os.path.isfile(os.path.join(path, STATE_FILE))}
    if resumed is None or os.path.realpath(output_dir) != str(Path(os.path.realpath(resumed)).parent):
        return list(found.values())
    here = next((step for step, path in found.items() if os.path.samefile(path, resumed)), 0)
    return [path for step, path in found.items() if step > here]


def _earlier(output_dir: str, others: list[str], resumed: str | None) -> str:
    names = [Path(path).name for path in others]
    listed = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
    begins = "begins anew" if resumed is None else f"goes on from {resumed}"
    return (
        f"{output_dir} holds checkpoints of an earlier run, {listed}, and this one {begins}: they stay there among its "
        f"own, and a later resume_from_checkpoint=True (Axolotl: auto_resume_from_checkpoints) takes the highest "
        f"number, {names[-1]} for now. Give each run an output_dir of its own, or remove them."
    )


def changed_rows(checkpoint: str, now: dict[str, int]) -> dict[str, tuple[Any, Any]]:
    """Returns {argument: (then, now)} where a step takes another number of rows than in a checkpoint's run.

    Nothing where the checkpoint does not say, or where the product is the same.
    """
    before = trained_rows(checkpoint)
    if before.keys() != now.keys() or math.prod(before.values()) == math.prod(now.values()):
        return {}
    return {key: (before[key], now[key]) for key in now if before[key] != now[key]}


def changed_terms(checkpoint: str, config: RegularizerConfig) -> dict[str, tuple[Any, Any]]:
    """Returns {setting: (value that a checkpoint was trained with, value now)} where what is trained differs.

    Nothing where the checkpoint does not say; `config`: the settings in force.
    """
    before, now = trained_terms(checkpoint) or {}, config.to_dict()
    changed = {key: (before[key], now[key]) for key in now if key in before and before[key] != now[key]}
    changed = {key: values for key, values in changed.items() if key not in _NEUTRAL}
    return {} if set(changed) == {"preset"} else changed  # every value of it is the same
