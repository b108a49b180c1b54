"""Stops training at a term or a weight that is NaN or inf, before anything of it is logged or saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..adapter.config import our_adapters
from ..checkpoint.integrity import recommended
from ..checkpoint.manifest import LARGEST
from ..distributed import is_sharded
from ..finite import largest_values
from .host import HostTrainer
from .run_state import RunState

_HEAVY = 1e3  # a weight from here on multiplies gradients so far that it may be what overflowed


class FiniteGuard(TrainerCallback):
    """Looks at the terms where the device is waited for anyhow (a log, an evaluation, a checkpoint, the last step).

    At the last three it looks at everything that trains too: a gradient may overflow after a finite loss.

    Raises:
        FloatingPointError: names the term or the tensor, the step and the last whole checkpoint; on every rank at once.
    """

    def __init__(self, run: RunState, host: HostTrainer) -> None:
        self._run, self._host = run, host

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if last or control.should_log or control.should_save or control.should_evaluate:
            self._look_at_terms()
        if last or control.should_save or control.should_evaluate:
            self._look_at_weights()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_save or control.should_evaluate:
            self._look_at_terms()
        if control.should_save or control.should_evaluate:
            self._look_at_weights()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the run leaves, also where it ended early or went back to its best checkpoint."""
        self._look_at_terms()
        largest = self._look_at_weights()
        if largest > LARGEST:
            self._run.warn(
                "largest",
                f"the largest weight that was trained is {largest:.3g}, beyond what half precision holds "
                f"({LARGEST:g}): the learning_rate was far too high.",
            )

    def _look_at_terms(self) -> None:
        found = self._run.metrics.first_bad(self._host.accelerator.gather)
        if found is None:
            return
        name, step = found
        what = "the task loss" if name == "task" else f"the {name} term (lambda_{name})"
        raise FloatingPointError(
            f"balora/{name}: {what} was NaN or inf at step {step}. Training was stopped, nothing was saved after it. "
            + _go_on(self._host)
        )

    def _look_at_weights(self) -> float:
        return largest_weight(self._host, f"after step {self._host.state.global_step}", together=True)


def largest_weight(host: HostTrainer, when: str, *, together: bool) -> float:
    """Returns the largest magnitude of everything that trains: one fused reduction, one wait for the device.

    Looks at what the optimizer keeps of it too.

    `together`: every rank calls it, and all have one verdict; else each has its own, which of DDP's copies is the same.

    Raises:
        FloatingPointError: a tensor holds NaN or inf; names it, `when`, and the last whole checkpoint.
    """
    weights = {name: value for name, value in host.model.named_parameters() if value.requires_grad}
    trained = weights | _moments(host, weights)
    values = largest_values(list(trained.values()))
    if trained and together and host.accelerator.num_processes > 1:
        values = host.accelerator.gather(values.to(host.args.device).unsqueeze(0)).amax(dim=0)
    found = values.tolist()
    for name, value in zip(trained, found, strict=True):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} holds NaN or inf {when}, of a gradient that overflowed or a step too large. Training was "
                f"stopped, nothing was saved after it. {_go_on(host)}"
            )
    return max(found[: len(weights)], default=0.0)


def _moments(host: HostTrainer, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer keeps of each weight: Adam's second moment, once inf, lets its weight never move again."""
    state = getattr(host.optimizer, "state", None)
    if not isinstance(state, Mapping):  # none yet, or an engine's
        return {}
    return {
        f"{key} of the optimizer for {name}": value
        for name, weight in weights.items()
        for key, value in state.get(weight, {}).items()
        if isinstance(value, Tensor) and value.ndim and _is_plain(value)
    }


def _is_plain(value: Tensor) -> bool:
    """Whether it is numbers, on one rank or on several: torchao's states of 4 and 8 bits know no norm."""
    return type(value) in (Tensor, nn.Parameter) or hasattr(value, "to_local")


def saved_weight(host: HostTrainer) -> float:
    """[`largest_weight`] before a save, which the first rank alone may ask for, except of a model that is split."""
    return largest_weight(host, "and cannot be saved", together=is_sharded(host.model))


def _go_on(host: HostTrainer) -> str:
    found = recommended(str(host.args.output_dir), our_adapters(host.model))
    start = f"Resume from {found.path}" if found.path else "Start again"
    lower = ", ".join([*heavy_weights(getattr(host, "ba_lora_run", None)), "a lower learning_rate or max_grad_norm"])
    return f"{start} with {lower}; if it comes back at the same step, look at that batch.{found.in_words()}"


def heavy_weights(run: RunState | None) -> list[str]:
    """Returns, for each weight in force that may be what overflowed, what to write instead, in words."""
    found: list[str] = []
    if run is None:
        return found
    for name, weight in run.own.in_force._asdict().items():
        if weight < _HEAVY:
            continue
        if name == "consistency" and run.config.drift_target is not None:
            found.append(
                f"a higher drift_target (now {run.config.drift_target:g}, with lambda_consistency at {weight:.3g})"
            )
        else:
            found.append(f"a lower lambda_{name} (now {weight:g})")
    return found
