"""Says once where a PiSSA start meets a LoRA's learning rate: the first steps' gradients are far above the clip."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..adapter.config import BaLoraConfig
from ..config import RECOMMENDED_RATE

if TYPE_CHECKING:  # for type checkers a mixin over a Trainer
    from transformers import Trainer as _Base
else:
    _Base = object

FIRST = 5  # optimizer steps
FAR = 3.0  # times max_grad_norm
LORAS = 2.0  # times the recommended rate: from there on a rate is a LoRA's


class FirstNorms:
    """The gradient norms of the first optimizer steps, before they are clipped; judged when all are there.

    Args:
        start: The adapter's init_lora_weights.
        clip: The trainer's max_grad_norm.
        rate: Its learning_rate.
        warn: warn(key, message), which says each key once.
    """

    def __init__(self, start: str, clip: float, rate: float, warn: Callable[[str, str], None]) -> None:
        self._start, self._clip, self._rate, self._warn = start, clip, rate, warn
        self._norms: list[Any] = []

    @classmethod
    def of(cls, adapter: Any, args: Any, warn: Callable[[str, str], None]) -> FirstNorms | None:
        """Returns what watches a run with this adapter and these arguments; None where there is nothing to say."""
        delta = isinstance(adapter, BaLoraConfig) and adapter.delta
        if not delta or not args.max_grad_norm or args.learning_rate < LORAS * RECOMMENDED_RATE:
            return None
        return cls(str(adapter.init_lora_weights), args.max_grad_norm, args.learning_rate, warn)

    def add(self, step: int, norm: Any) -> None:
        """Takes the norm of a step, counted from 0, a number or a tensor; waits for the device at the last alone."""
        if step >= FIRST or norm is None:
            return
        self._norms.append(norm)
        if len(self._norms) == FIRST:
            self._judge([float(each) for each in self._norms])

    def _judge(self, norms: list[float]) -> None:
        median = statistics.median(norms)
        if not median > FAR * self._clip:
            return
        self._warn(
            "first_norms",
            f"the gradient norm of the first {FIRST} steps is {median:.3g} (median), and max_grad_norm={self._clip:g} "
            f"clips it: learning_rate={self._rate:g} is a LoRA's, and a PiSSA start (init_lora_weights="
            f"{self._start!r}) moves the weights further at the same rate. Try learning_rate={RECOMMENDED_RATE:g} "
            "(docs/choose.md).",
        )


class WatchesNorms(_Base):
    """A mixin for a Trainer: shows each step's gradient norm, which the host has anyhow, to the run's FirstNorms."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Returns the norm before clipping, as the host does."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        run = getattr(self, "ba_lora_run", None)
        if run is not None and run.first_norms is not None:
            run.first_norms.add(self.state.global_step, norm)
        return norm
