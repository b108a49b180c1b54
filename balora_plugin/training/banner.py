"""What a run says at its start, in four lines: method, terms, teacher, what is trained."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from ..adapter.config import BaLoraConfig
from ..adapter.saved.provenance import teacher_in_words
from ..weights.in_words import terms_in_words
from .run_state import RunState

logger = logging.get_logger(__name__)


class Banner(TrainerCallback):
    """Prints the banner when training begins, once, where progress is shown; the whole list of layers at level info."""

    def __init__(self, run: RunState) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        (logger.info if args.disable_tqdm else print)(banner(self._run))
        if self._run.adapted is not None:
            logger.info(str(self._run.adapted))


def banner(run: RunState) -> str:
    """Returns the four lines of a run."""
    if run.adapter is None and run.cache is not None:  # no adapter to switch off
        teacher = "the model as it was before the first step, its outputs kept in a teacher_cache"
    else:
        teacher = teacher_in_words(run.config, run.teacher)
    return "\n".join(
        [
            f"BA-LoRA: {method(run)}, on {type(run.model).__name__}",
            f"  terms    {terms_in_words(run.config)}",
            f"  teacher  {teacher}",
            f"  trains   {_trained(run)}",
        ]
    )


def method(run: RunState) -> str:
    """Returns what kind of training a run is, in words."""
    adapter = run.adapter
    if adapter is None:
        return "the terms on full fine-tuning"
    shape = f"rank {adapter.r}, alpha {adapter.lora_alpha:g}" if hasattr(adapter, "lora_alpha") else "no LoRA"
    if not isinstance(adapter, BaLoraConfig):
        return f"the terms on {type(adapter).__name__}'s adapter, {shape}"
    if adapter.delta:
        return f"start {adapter.init_lora_weights} in delta form, {shape}"
    return f"an ordinary LoRA start, {shape}"


def _trained(run: RunState) -> str:
    if run.adapted is not None:
        return run.adapted.in_short()
    numbers = [parameter.numel() for parameter in run.wrapped.parameters() if parameter.requires_grad]
    return f"{sum(numbers):,} numbers in {len(numbers)} tensors"
