"""The state of one training run: what BA-LoRA knows of it beside what its Trainer knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ..adapter.config import BaLoraConfig, active_config
from ..adapter.kinds import WhatIsAdapted
from ..config import RegularizerConfig
from ..distributed import is_sharded
from ..fused.head import Head
from ..fused.loss import PLAIN_TASK, TaskForm
from ..fused.project import project
from ..objective.batches import main_input, without_crossings
from ..objective.request import AnchorRows, CompiledPasses
from ..objective.some_rows import rows_apart
from ..pretrained.by_layer import ByLayer
from ..pretrained.lm_head import read_head
from ..pretrained.shared_layers import SharedLayers
from ..pretrained.switch import TeacherSwitch
from ..teacher.cache import TeacherCache
from .checks.since import AsMade
from .checks.token_ids import check_ids
from .cost import CostMeter
from .first_norms import FirstNorms
from .metrics import TermMetrics
from .own_weights import OwnWeights
from .packing_probe import PackingProbe

logger = logging.get_logger(__name__)

Inputs = dict[str, Any]


class WarnOnce:
    """Says each warning of a run once, by its key.

    Attributes:
        said: The keys of what was said.
    """

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(self, key: str, message: str) -> None:
        if key not in self.said:
            self.said.add(key)
            logger.warning(f"BA-LoRA: {message}")


class Anchors(Protocol):
    """Text without labels, as the steps and evaluations of a run meet it."""

    def of_step(self, micro: int, weight: float) -> AnchorRows:
        """Returns those of a micro-batch of the current step; `weight`: of their consistency."""

    def of_evaluation(self, weight: float) -> AnchorRows | None:
        """Returns the fixed ones, once an evaluation."""


@dataclass
class RunState:
    """Everything a run's parts share: they are given this, never the trainer's private attributes.

    Attributes:
        config: The settings in force, every one resolved.
        model: The model inside any adapter, whose forward takes the objective.
        switch: Turns the adapters off, which gives the teacher.
        metrics: The sums behind the log keys.
        warn: Says a warning once, by its key.
        wrapped: The model as the trainer has it, with any adapter.
        extend: The host's keywords for a forward pass, added to a batch (`extend_ba_lora_inputs`).
        to_device: The host's own way to bring a batch to its device.
        own: The weights in force, and what sets them.
        as_made: The settings as they were when the trainer was made.
        task_form: The form of the task term that the host's arguments ask for.
        teacher: A second model as teacher.
        compiled: Teacher and student as compiled passes.
        shared: The layers that teacher and student compute once; None where no teacher runs.
        by_layer: Lets the teacher run inside the student's pass; None where that is not asked for.
        cache: The teacher's outputs on disk.
        anchors: Text without labels for the consistency term; None where there is none.
        packing: Asks once whether packed documents see each other; None for classifiers.
        initial_head: The LM head that full fine-tuning with a cache began with, which is the teacher's.
        meter: What counts the run's cost; there from the start of training.
        predicts: Whether a batch is being evaluated, though the model may be in training mode.
        wants_logits: Whether the evaluation at hand asks for logits.
        adapted: What the adapter stands on; None in full fine-tuning.
        reached: Whether a backward pass came to a loss with the terms since that was looked at last.
        finished: The run was resumed after its last step, so that it has nothing to do.
        callbacks: What watches the run, for its trainer to call.
        resumed: The checkpoint that training goes on from.
        first_norms: What looks at the first steps' gradients; None where nothing is clipped, or the start is no PiSSA.
        batch_shape: Rows and tokens of the micro-batch that was begun last.
        rows_apart: How many of its rows a teacher can be given each for itself; 1 where they are one whole.
        ids: Its token ids, looked at in the first one, and in one that fails.
        counts: False while a classifier's batch holds nothing but samples that were evaluated before.
    """

    config: RegularizerConfig
    wrapped: nn.Module
    model: PreTrainedModel
    switch: TeacherSwitch
    metrics: TermMetrics
    warn: WarnOnce
    extend: Callable[[Inputs], Inputs]
    to_device: Callable[[Inputs], Inputs]
    own: OwnWeights
    as_made: AsMade
    task_form: TaskForm = PLAIN_TASK
    teacher: PreTrainedModel | None = None
    compiled: CompiledPasses | None = None
    shared: SharedLayers | None = None
    by_layer: ByLayer | None = None
    cache: TeacherCache | None = None
    anchors: Anchors | None = None
    packing: PackingProbe | None = None
    initial_head: Head | None = None
    meter: CostMeter | None = None
    adapted: WhatIsAdapted | None = None
    callbacks: list[TrainerCallback] = field(default_factory=list)
    resumed: str | None = None
    first_norms: FirstNorms | None = None
    predicts: bool = False
    wants_logits: bool = False
    counts: bool = True
    batch_shape: tuple[int, int] | None = None
    rows_apart: int = 1
    ids: Tensor | None = None
    finished: bool = False
    reached: bool = False

    @property
    def adapter(self) -> Any:
        """The config of the adapter that is active now; None in full fine-tuning."""
        return active_config(self.wrapped)

    @property
    def ours(self) -> bool:
        """Whether the active adapter is a BA-LoRA adapter."""
        return isinstance(self.adapter, BaLoraConfig)

    def inputs(self, batch: Inputs) -> Inputs:
        """Returns what a batch gives to the model's forward: without a host's notes to itself and to Liger's loss."""
        plain = {key: value for key, value in batch.items() if not key.startswith("_") and key != "skip_logits"}
        rows, length = main_input(plain).shape[:2]
        self.rows_apart = rows_apart(plain)
        first, self.ids = self.batch_shape is None, plain.get("input_ids")
        self.batch_shape = (rows, length)
        if first and self.ids is not None:
            check_ids(self.ids, self.model)
        return self.extend(without_crossings(plain))

    def follow(self, loss: Tensor) -> None:
        """Notes that a backward pass came to `loss`, which holds the terms: a subclass may return another."""
        if not self.reached and loss.requires_grad:
            loss.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        self.reached = True

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Returns the student's logits (B, T, V) of its final hidden states (B, T, d), in their graph.

        Raises:
            ValueError: an engine has split the head, which is whole inside the model's forward alone.
        """
        if is_sharded(self.model):
            raise ValueError(
                "outputs.logits: FSDP or ZeRO-3 has split the LM head, which is whole only inside the model's forward. "
                "Read logits under DDP, or ask the model for them: model(**inputs).logits."
            )
        head = read_head(self.model)
        return project(hidden.to(head.weight.device), head).to(hidden.dtype)

    def initial_head_on(self, device: torch.device) -> Head | None:
        """Returns the head that full fine-tuning began with, moved to the device that it is needed on."""
        head = self.initial_head
        if head is not None and head.weight.device != device:
            bias = None if head.bias is None else head.bias.to(device)
            head = self.initial_head = Head(head.weight.to(device), bias, head.scale, head.softcap)
        return head
