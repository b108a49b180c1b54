"""ms-swift's two trainers with BA-LoRA: the core's mixin over its Seq2SeqTrainer and its Trainer."""

from __future__ import annotations

from typing import Any

import torch
from swift.trainers import Seq2SeqTrainer
from swift.trainers import Trainer as SampleTrainer
from torch import Tensor

from ...objective.request import StepOutput
from ...training.trainer import BaLoraTrainerMixin
from .multimodal import carrying
from .saved import write_as_stock

_NOTES = ("compute_loss_func", "loss_scale", "channel", "text_position_ids")  # of a batch, to ms-swift's own loss


class _SwiftHost(BaLoraTrainerMixin):
    """What both trainers do differently beside `tuner_type: ba_lora`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model_meta.is_multimodal:
            self.template.pre_forward_hook = carrying(self.template.pre_forward_hook)
        if self.is_world_process_zero():
            write_as_stock(self.args.output_dir)

    def _save_initial_model(self, output_dir: str) -> None:
        """Nothing: ms-swift keeps the first factors of any start with "pissa" in its name, to convert what it saves."""

    def _save_converted_model(self, output_dir: str) -> None:
        """Nothing to convert: what is saved is a LoRA of the original base already."""

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; ms-swift's `resume_only_model` is a fresh optimizer."""
        fresh = bool(resume_from_checkpoint) and bool(self.args.resume_only_model)
        return super().train(resume_from_checkpoint, *args, fresh_optimizer=fresh, **kwargs)

    def extend_ba_lora_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in inputs.items() if key not in _NOTES}

    def _update(self, training: bool, name: str, values: Tensor) -> None:
        self.custom_metrics["train" if training else "eval"][name].update(values)


class SwiftBaLoraTrainer(_SwiftHost, Seq2SeqTrainer):
    """Language models."""

    def get_use_logits_to_keep(self, default_value: bool = True) -> bool:
        """False: with the logits ms-swift cuts the labels too."""
        return False

    def weigh_ba_lora_task(self, inputs: dict[str, Any]) -> Tensor | None:
        """`loss_scale`: a factor for each label, where it is not 0 or 1 alone."""
        return inputs.get("loss_scale")

    def record_ba_lora_metrics(self, out: StepOutput, inputs: dict[str, Any], training: bool) -> None:
        """ms-swift's token_acc, a mean over tokens, and its aux_loss."""
        assert out.count is not None and out.correct is not None
        hits = torch.arange(int(out.count)) < int(out.correct)
        if hits.numel():
            self._update(training, "token_acc", hits)
        if out.aux_loss is not None:
            self._update(training, "aux_loss", out.aux_loss.detach())


class SwiftBaLoraClassifierTrainer(_SwiftHost, SampleTrainer):
    """Classifiers of sequences."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss, and counts ms-swift's `acc` as its own compute_loss does."""
        if self.ba_lora_run is not None:
            self.ba_lora_run.wants_logits = True  # in evaluation; the host's prediction_step puts it back
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._compute_acc(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss
