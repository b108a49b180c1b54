"""What a classification run does beside its loss: checks, the head's warm-up, the teacher's head in checkpoints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import TrainerCallback
from transformers.utils import logging

from ..adapter.config import BaLoraConfig
from ..checkpoint.names import HEAD_FILE
from ..pretrained.classifier_head import half_heads, hand_over, read_teacher_head, train_in_float32, write_teacher_head
from .checks.arguments import check_classifier_run
from .checks.model import check_tokenizer
from .checks.teacher import check_same_head

if TYPE_CHECKING:
    from .trainer import BaLoraTrainerMixin

logger = logging.get_logger(__name__)


def set_up(trainer: BaLoraTrainerMixin, classifier: Any, teacher: Any, *, compiled: bool | str) -> None:
    """Checks a classification run, says what acts in it, and arranges the head's warm-up.

    Raises:
        ValueError: settings that do not go together; names the key, its value and what to write.
    """
    config = trainer.ba_lora
    assert config is not None
    check_classifier_run(
        classifier,
        config,
        trainer.args,
        compiled=compiled,
        fsdp=bool(trainer.is_fsdp_enabled),
        deepspeed=bool(trainer.is_deepspeed_enabled),
    )
    check_tokenizer(classifier, getattr(trainer, "processing_class", None))
    if teacher is not None and config.lambda_consistency:
        check_same_head(classifier, teacher)
    if config.lambda_consistency and (
        classifier.config.num_labels == 1 or classifier.config.problem_type == "regression"
    ):
        trainer._ba_lora_warn(
            "consistency_regression",
            "a regression has no classes: consistency is the squared difference of the outputs, not "
            f"{config.consistency!r}.",
        )
    _keep_small_updates(trainer, classifier)
    if config.head_warmup_steps:
        trainer.add_callback(HeadWarmup(trainer, classifier))


def _keep_small_updates(trainer: BaLoraTrainerMixin, classifier: Any) -> None:
    """A base loaded in half precision has its new head in it: trained so, the head would stand still."""
    if not isinstance(trainer.model, PeftModel):
        return
    heads = half_heads(classifier, trainer.model.active_adapters[0])
    if trainer.args.bf16 or trainer.args.fp16:
        for module in heads.values():
            train_in_float32(module)
    elif heads:  # without autocast its logits would be of another dtype than the teacher's
        trainer._ba_lora_warn(
            "half_head",
            f"{', '.join(heads)} would train in half precision, where small updates are rounded away: load the model "
            "with dtype=torch.float32, or set bf16=True.",
        )


class HeadWarmup(TrainerCallback):
    """After `head_warmup_steps` optimizer steps of the head alone, gives the teacher the head that they made."""

    def __init__(self, trainer: BaLoraTrainerMixin, classifier: Any) -> None:
        self.trainer, self.classifier = trainer, classifier

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = self._steps()
        if steps >= state.max_steps:
            raise ValueError(
                f"head_warmup_steps={steps} is not below the {state.max_steps} optimizer steps of this run, so the "
                "adapter would never train: set it lower."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # before the evaluation and the checkpoint of this step, which belong to the new teacher
        if state.global_step == self._steps():
            model, teacher = self.trainer.model, self.trainer._ba_lora_teacher
            if teacher is not None or isinstance(model, PeftModel):
                hand_over(self.classifier, teacher, model.active_adapters[0] if isinstance(model, PeftModel) else "")
            logger.info(f"BA-LoRA: the head was trained alone for {state.global_step} steps; the teacher has it now.")

    def _steps(self) -> int:
        assert self.trainer.ba_lora is not None
        return self.trainer.ba_lora.head_warmup_steps


def save_head(trainer: BaLoraTrainerMixin, directory: str) -> None:
    """The teacher's head beside what the trainer saves; a BA-LoRA adapter has written it already."""
    if _is_ours(trainer.model) or not trainer.args.should_save:
        return
    teacher = trainer._ba_lora_teacher
    if teacher is not None or isinstance(trainer.model, PeftModel):
        write_teacher_head(directory, trainer.model.get_base_model() if teacher is None else teacher)


def restore_head(trainer: BaLoraTrainerMixin, checkpoint: str) -> None:
    """The teacher's head of the run that is resumed; loading a BA-LoRA adapter restores it by itself.

    Raises:
        ValueError: the checkpoint has none.
    """
    config = trainer.ba_lora
    if config is None or config.task != "nlu" or not config.lambda_consistency or _is_ours(trainer.model):
        return
    path = os.path.join(checkpoint, HEAD_FILE)
    if not os.path.isfile(path):
        raise ValueError(
            f"{checkpoint} holds no {HEAD_FILE}, so the teacher would get another head than the run began with: "
            "resume a checkpoint of a run with these terms, or set lambda_consistency=0."
        )
    teacher = trainer._ba_lora_teacher
    read_teacher_head(path, trainer.model.get_base_model() if teacher is None else teacher)


def _is_ours(model: Any) -> bool:
    return isinstance(model, PeftModel) and isinstance(model.peft_config.get(model.active_adapters[0]), BaLoraConfig)
