"""What a trainer asks of one forward pass, and what that gives back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..config import RegularizerConfig
from ..fused import TopLogProbs
from ..fused.factor import FactorCache
from ..fused.head import Head
from ..fused.loss import PLAIN_TASK, TaskForm
from ..pretrained.by_layer import ByLayer
from ..pretrained.shared_layers import SharedLayers
from ..pretrained.switch import TeacherSwitch
from ..schedules import Lambdas
from ..teacher.cache import TeacherCache

if TYPE_CHECKING:
    from ..compile.layers import CompiledLayers


Way = TypeVar("Way", SharedLayers, ByLayer)
Part = Callable[[str], AbstractContextManager[None]]  # counts what runs inside as that part of a run's cost


def uncounted(name: str) -> AbstractContextManager[None]:
    """The `part` of a pass whose cost nobody counts."""
    return nullcontext()


class Measures(NamedTuple):
    """What is to be measured at T = 1, whatever the terms: `drift`, KL(teacher || student); `entropy`, the teacher's
    over the largest possible; `student_entropy`, a classifier's in nats (that of tokens always is)."""

    drift: bool = False
    entropy: bool = False
    student_entropy: bool = False


class AnchorRows(NamedTuple):
    """The anchors that a micro-batch meets, perhaps none; tensors on the batch's device.

    Attributes:
        ids: (A, T) token ids, 0 behind the end of a row.
        counted: (A, T) bool: the documents' tokens, each of which counts.
        teacher: What the teacher says at the M counted tokens: final hidden states (M, d), or TopLogProbs (M, K), ...;
            None where there are no rows.
        weight: Of the consistency of an anchor, the schedule's and that of steps that have some.
        whole: Counted tokens of the step's anchors, over all micro-batches and processes.
        parts: Micro-batches of the step, over all processes.
    """

    ids: Tensor
    counted: Tensor
    teacher: Tensor | TopLogProbs | None
    weight: float
    whole: int
    parts: int


class AnchorTerm(NamedTuple):
    """The consistency over a micro-batch's anchors.

    Attributes:
        loss: Weighted, over the step's counted anchor tokens, differentiable: the step's is the sum over its parts.
        consistency: The sum over this micro-batch's anchor tokens, detached.
        tokens: How many these are.
        part: 1 over the step's parts.
    """

    loss: Tensor
    consistency: Tensor
    tokens: Tensor
    part: Tensor


@dataclass
class StepRequest:
    """What the trainer asks of one forward pass.

    `lambdas` are the weights in force; lambdas.consistency includes `teacher_factor`, the teacher interval (or 0).
    `teacher_head`: the teacher's head where the student's own has moved and no copy is in the model. `fill`: only make
    sure that the cache holds the batch's teacher states. `head_only`: a classifier's head on the pre-trained features.
    `return_hidden`: the student's final hidden states, in their graph, for logits that somebody may ask for.
    `counts`: False where a classifier's samples were all evaluated before. `part(name)` counts what runs inside as that
    part of the run's cost. `task_weights`: of each sample's task loss, (B,), or of each label's, (B, L); on the batch's
    device. `task_form`: smoothed, or weighted by the probability of its target, as the host's arguments ask. `monitor`:
    every term is measured, at weight 0 too. `measures`: beside the terms, where the teacher runs. `anchors`: rows
    beside the batch's for the consistency term alone; None where a run has none. `shared`: the layers that teacher and
    student need not both compute; None where they do. `by_layer`: lets the teacher go through each layer in the
    student's call of it; None where the teacher has a pass of its own. `teacher_rows`: the rows that the teacher runs
    on, None for all; none of them where it runs because it does in other processes, and nothing of it is used.
    `teacher_late`: where layers are shared it runs after the student though it meets all rows, as it does in processes
    where it meets some.
    """

    config: RegularizerConfig
    lambdas: Lambdas
    factors: FactorCache = field(default_factory=FactorCache)
    teacher: PreTrainedModel | None = None
    return_logits: bool = False
    return_hidden: bool = False
    measure_shares: bool = False
    teacher_factor: int = 1
    switch: TeacherSwitch | None = None
    compiled: CompiledPasses | None = None
    seed: int = 0
    cache: TeacherCache | None = None
    teacher_head: Head | None = None
    fill: bool = False
    head_only: bool = False
    counts: bool = True
    part: Part = uncounted
    task_weights: Tensor | None = None
    task_form: TaskForm = PLAIN_TASK
    measures: Measures = Measures()  # noqa: RUF009  (a tuple)
    anchors: AnchorRows | None = None
    monitor: bool = False
    shared: SharedLayers | None = None
    teacher_rows: tuple[int, ...] | None = None
    teacher_late: bool = False
    by_layer: ByLayer | None = None

    @property
    def measured(self) -> Lambdas:
        """Returns the weights, 1 in place of 0 where all terms are measured: a term is computed where it has one."""
        return Lambdas(*(weight or 1.0 for weight in self.lambdas)) if self.monitor else self.lambdas

    def shares(self, model: PreTrainedModel) -> SharedLayers | None:
        """Returns the layers that this pass of `model` computes once; None where it does not."""
        return self._of(self.shared, model)

    def layered(self, model: PreTrainedModel) -> ByLayer | None:
        """Returns what may run the teacher of this pass of `model` by layer; None where nothing may."""
        return self._of(self.by_layer, model)

    def _of(self, way: Way | None, model: PreTrainedModel) -> Way | None:
        if way is None or self.head_only or not self.measured.consistency:
            return None
        return way if way.serves(model, training=model.training and torch.is_grad_enabled()) else None


class CompiledPasses(NamedTuple):
    """[`backbone_pass`] and [`student_pass`], each compiled as one graph; or `layers`, and no pass of the student's."""

    teacher: Callable[..., Any]
    student: Callable[..., Any] | None = None
    layers: CompiledLayers | None = None

    def in_use(self) -> str:
        """How the student is compiled, if compiling did not fail: "whole" (its terms in its graph), "layers" or ""."""
        if self.layers is not None:
            return "" if self.layers.failed else "layers"
        return "whole" if getattr(self.student, "compiled", None) is not None else ""


@dataclass
class StepOutput(ModelOutput):
    """Sums over counted tokens, and the batch's spectral term. `loss` and `svd` are differentiable, 0-d.

    `loss` = task + weighted token terms; `svd` is unweighted, None if it is off; `svd_used_k` is 0 where it cannot act
    (and `svd` 0). `shares` (3,): the norm of each weighted term's gradient over the task's, with respect to the final
    hidden states. A classifier's are sums over samples: `svd` is in `loss` too, and `svd_count`, `diversity_count` say
    for how many samples the batch's statistics stand. `drift`, `teacher_entropy`, and a classifier's `entropy`: sums as
    [`Measures`] has them. `anchors`: their own consistency, which is not in `loss`. `taught`: how many counted tokens
    (samples) met the teacher, where not all of them did.
    """

    loss: Tensor | None = None
    task: Tensor | None = None
    consistency: Tensor | None = None
    diversity: Tensor | None = None
    entropy: Tensor | None = None
    correct: Tensor | None = None
    count: Tensor | None = None
    svd: Tensor | None = None
    svd_used_k: Tensor | None = None
    svd_count: Tensor | None = None
    diversity_count: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    shares: Tensor | None = None
    drift: Tensor | None = None
    anchors: AnchorTerm | None = None
    teacher_entropy: Tensor | None = None
    taught: Tensor | None = None

    @property
    def met_teacher(self) -> Tensor:
        """How many counted tokens (samples) met the teacher, 0-d, where it ran."""
        assert self.count is not None
        return self.count if self.taught is None else self.taught


Step = Callable[[Any, StepRequest, dict[str, Any]], StepOutput]
