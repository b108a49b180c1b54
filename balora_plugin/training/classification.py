"""What a classification run does beside its loss: checks, the head's warm-up, the teacher's head in checkpoints."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ..adapter.delta import PEFT_PREFIX
from ..checkpoint.names import HEAD_FILE
from ..distributed import is_sharded, whole_for_writing
from ..fused.loss import TaskForm
from ..objective.classification_terms import MULTI_LABEL, REGRESSION, check_form
from ..pretrained.classifier_head import (
    half_heads,
    hand_over,
    heads_of,
    read_teacher_head,
    train_in_float32,
    write_teacher_head,
)
from .checks.arguments import check_classifier_run
from .checks.model import check_tokenizer
from .checks.teacher import check_same_head
from .host import HostTrainer
from .run_state import RunState

logger = logging.get_logger(__name__)


def set_up(run: RunState, host: HostTrainer, *, compiled: bool | str) -> None:
    """Checks a classification run, says what acts in it, and arranges the head's warm-up.

    Raises:
        ValueError: settings that do not go together; names the key, its value and what to write.
    """
    config, classifier = run.config, run.model
    restored = run.ours and (host.accelerator.is_fsdp2 or bool(host.is_deepspeed_enabled))  # by RestoreAdapter
    check_classifier_run(
        classifier,
        config,
        host.args,
        compiled=compiled,
        fsdp=(bool(host.is_fsdp_enabled) or is_sharded(classifier)) and not restored,
        deepspeed=bool(host.is_deepspeed_enabled) and not restored,
    )
    check_tokenizer(classifier, host.processing_class)
    run.task_form = _form_of_task(classifier, run.task_form)
    if run.teacher is not None and config.lambda_consistency:
        check_same_head(classifier, run.teacher)
    if config.lambda_consistency and (
        classifier.config.num_labels == 1 or classifier.config.problem_type == "regression"
    ):
        run.warn(
            "consistency_regression",
            "a regression has no classes: consistency is the squared difference of the outputs, not "
            f"{config.consistency!r}.",
        )
    _check_entropy(run)
    _keep_small_updates(run, host)
    if config.head_warmup_steps:
        run.callbacks.append(HeadWarmup(run, host))


def _check_entropy(run: RunState) -> None:
    """Refuses to weigh by the entropy of a regression, which has no classes."""
    config = run.model.config
    if run.config.schedule == "adaptive" and (config.num_labels == 1 or config.problem_type == REGRESSION):
        raise ValueError(
            "schedule='adaptive' weighs by the entropy of the teacher's classes, and a regression has none: write "
            "schedule='constant'."
        )


def _form_of_task(classifier: PreTrainedModel, form: TaskForm) -> TaskForm:
    """The form of the task loss, as far as the model's config says what its labels are."""
    config = classifier.config
    problem = config.problem_type or (REGRESSION if config.num_labels == 1 else None)
    if problem == MULTI_LABEL:
        form = form._replace(smoothing=0.0)  # the host says that it switches smoothing off for them
    if problem is not None:
        check_form(form, problem)
    return form


def _keep_small_updates(run: RunState, host: HostTrainer) -> None:
    """A base loaded in half precision has its new head in it: trained so, the head would stand still."""
    if not isinstance(host.model, PeftModel):
        return
    heads = half_heads(run.model, host.model.active_adapters[0])
    if host.args.bf16 or host.args.fp16:
        for module in heads.values():
            train_in_float32(module)
    elif heads:  # without autocast its logits would be of another dtype than the teacher's
        run.warn(
            "half_head",
            f"{', '.join(heads)} would train in half precision, where small updates are rounded away: load the model "
            "with dtype=torch.float32, or set bf16=True.",
        )


class HeadWarmup(TrainerCallback):
    """After `head_warmup_steps` optimizer steps of the head alone, gives the teacher the head that they made."""

    def __init__(self, run: RunState, host: HostTrainer) -> None:
        self._run, self._host = run, host
        self._steps = run.config.head_warmup_steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps >= state.max_steps:
            raise ValueError(
                f"head_warmup_steps={self._steps} is not below the {state.max_steps} optimizer steps of this run, so "
                "the adapter would never train: set it lower."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # before the evaluation and the checkpoint of this step, which belong to the new teacher
        if state.global_step == self._steps:
            model, teacher = self._host.model, self._run.teacher
            if teacher is not None or isinstance(model, PeftModel):
                name = model.active_adapters[0] if isinstance(model, PeftModel) else ""
                with whole_for_writing(p for module in heads_of(self._run.model) for p in module.parameters()):
                    hand_over(self._run.model, teacher, name)
            logger.info(f"BA-LoRA: the head was trained alone for {state.global_step} steps; the teacher has it now.")


def _keeps_head(run: RunState) -> bool:
    """Whether checkpoints hold the teacher's head in a file beside the adapter, which is not ours."""
    config = run.config
    return config.task == "nlu" and bool(config.lambda_consistency or config.monitor) and not run.ours


def save_head(run: RunState, host: HostTrainer, directory: str, state_dict: dict[str, Tensor] | None) -> None:
    """Writes the teacher's head beside what the trainer saves; a BA-LoRA adapter has written it already.

    `state_dict`: the model's, where an engine has gathered it.
    """
    if not _keeps_head(run) or not host.args.should_save:
        return
    if run.teacher is not None:
        write_teacher_head(directory, run.teacher)
    elif isinstance(host.model, PeftModel):
        of_base = {key.removeprefix(PEFT_PREFIX): value for key, value in (state_dict or {}).items()}
        write_teacher_head(directory, run.model, of_base)


def restore_head(run: RunState, checkpoint: str) -> None:
    """Reads the teacher's head of the run that is resumed; loading a BA-LoRA adapter restores it by itself.

    Raises:
        ValueError: the checkpoint has none.
    """
    if not _keeps_head(run):
        return
    path = os.path.join(checkpoint, HEAD_FILE)
    if not os.path.isfile(path):
        raise ValueError(
            f"{checkpoint} holds no {HEAD_FILE}, so the teacher would get another head than the run began with: "
            "resume a checkpoint of a run with these terms, or set lambda_consistency=0 and monitor=False."
        )
    read_teacher_head(path, run.model if run.teacher is None else run.teacher)
