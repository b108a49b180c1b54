"""Axolotl's trainer with BA-LoRA: the core's mixin over AxolotlTrainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from transformers import Trainer, TrainerCallback

from ...config import RegularizerConfig
from ...objective.request import StepOutput
from ...training.run_state import RunState
from ...training.trainer import BaLoraTrainerMixin
from .errors import as_setting_errors


class TaskPerplexity(Trainer):
    """Behind AxolotlTrainer, which logs the exponential of the total loss as `ppl`: here it is the task's again."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        terms = getattr(self, "ba_lora", None)
        if terms is not None and terms.task == "nlu":  # a classifier has none
            logs.pop("ppl", None), logs.pop("eval_ppl", None)
        if "ppl" in logs and "balora/task" in logs:
            logs["ppl"] = math.exp(min(logs["balora/task"], 700.0))
        super().log(logs, *args, **kwargs)


class AxolotlBaLoraTrainer(BaLoraTrainerMixin, AxolotlTrainer, TaskPerplexity):
    """Token terms are normalised over the accumulated global batch, as in TRL, not by Axolotl's micro-batch mean."""

    terms: RegularizerConfig | None = None  # for adapters that do not carry them: see `trainer_class`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, regularizers=self.terms, **kwargs)
        if self.ba_lora is not None:
            self.args.average_tokens_across_devices = True

    def _begin(self, run: RunState, checkpoint: str | None) -> list[TrainerCallback]:
        with as_setting_errors():  # data of which nothing can be learnt is one line, as a wrong setting is
            return super()._begin(run, checkpoint)

    def record_ba_lora_metrics(self, out: StepOutput, inputs: dict[str, Any], training: bool) -> None:
        """Axolotl's token counts (`include_tkps`), which its own compute_loss would keep."""
        if not (training and self.args.include_tkps):
            return
        assert out.count is not None
        totals = torch.stack([out.count, out.count.new_tensor(inputs["input_ids"].numel())]).double()
        trainable, total = self.accelerator.reduce(totals, "sum").cpu()
        tokens = getattr(self.state, "tokens", None) or {"trainable": torch.zeros(1), "total": torch.zeros(1)}
        self.state.tokens = {"trainable": tokens["trainable"] + trainable, "total": tokens["total"] + total}


def trainer_class(terms: RegularizerConfig | None, loss_type: str | None = None) -> type:
    """The trainer, carrying `terms` for an adapter that has none of its own, and the YAML's `loss_type`."""
    if terms is None and loss_type is None:
        return AxolotlBaLoraTrainer
    carried = {"terms": terms, "ba_lora_loss_type": loss_type}
    return type("AxolotlBaLoraTrainer", (AxolotlBaLoraTrainer,), carried)
