"""The form of the task term that a host's arguments ask for: decided here, for every host."""

from __future__ import annotations

from typing import Any

from ..fused.loss import TaskForm

NLL = ("nll", "chunked_nll")  # TRL's names of the cross-entropy: in chunks or not is its own way to compute it
DFT = "dft"
LOSS_TYPES = (*NLL, DFT)


def task_form(smoothing: Any, loss_type: Any) -> TaskForm:
    """Returns the form for transformers' `label_smoothing_factor` and TRL's `loss_type`; None: not set.

    Raises:
        ValueError: names the argument, its value and what to write.
    """
    smoothing = 0.0 if smoothing is None else smoothing
    if isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)) or not 0.0 <= smoothing <= 1.0:
        raise ValueError(
            f"label_smoothing_factor={smoothing!r} is the part of each target that goes to the whole vocabulary: write "
            "a number from 0 to 1."
        )
    if loss_type not in (None, *LOSS_TYPES):
        raise ValueError(f"loss_type={loss_type!r} is no form of BA-LoRA's task loss: write 'nll' or 'dft'.")
    if loss_type == DFT and smoothing:  # TRL leaves the smoothing out, without a word
        raise ValueError(
            f"label_smoothing_factor={smoothing!r} does not go together with loss_type='dft': set it to 0, or write "
            "loss_type='nll'."
        )
    return TaskForm(float(smoothing), loss_type == DFT)


def task_form_of(args: Any, loss_type: str | None = None) -> TaskForm:
    """Returns the form that training arguments ask for; `loss_type` where they have none of that name.

    Raises:
        ValueError: as [`task_form`].
    """
    return task_form(getattr(args, "label_smoothing_factor", None), getattr(args, "loss_type", None) or loss_type)
