"""One micro-batch of the NLU objective inside the classifier's own forward: teacher pass, student pass, terms.

The twin of `causal_lm` for sequence classification: it answers the same [`StepRequest`] with the same
[`StepOutput`]. Everything is a sum over samples, so that a micro-batch, a rank and a partial last batch weigh as many
samples as they hold; the statistics of a batch (covariance, spectrum) count once for each of its samples.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distributed import world_size
from ..fused.loss import PLAIN_TASK, MetRows
from ..pretrained.classifier_head import last_tokens, reads_last_token
from ..pretrained.switch import TeacherSwitch
from ..regularizers import upcast
from .batches import check_task_weights, main_input
from .classification_terms import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    BatchLabels,
    check_form,
    consistency_of,
    diversity_of,
    spectrum_of_samples,
    task_rows,
)
from .gather import gather_rows
from .measured import of_samples
from .request import StepOutput, StepRequest
from .some_rows import of_rows
from .two_passes import TwoPasses

IGNORED = -100

_padding_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose padding was looked at


def classification_step(model: PreTrainedModel, request: StepRequest, inputs: dict[str, Any]) -> StepOutput:
    """Teacher and student pass and the terms of one micro-batch.

    Args:
        model: The classifier (inside any PEFT and parallel wrapper).
        request: What to compute.
        inputs: Its forward's keywords: input_ids (B, L); labels (B,) of classes, or (B,), (B, D) of numbers for
            regression or several labels a sample; anything else goes to the model as it is.
    """
    lambdas, labels = request.measured, inputs.get("labels")
    if labels is None:
        raise ValueError("the batch holds no labels: name the column of classes or scores 'label' or 'labels'.")
    inputs = {key: value for key, value in inputs.items() if key not in ("labels", "return_dict") and value is not None}
    problem = problem_of(model, labels)
    check_fit(labels, problem, model.config.num_labels)
    single = problem == SINGLE_LABEL
    n = labels.shape[0]
    counted = labels.new_full((n,), request.counts, dtype=torch.bool)
    if single:
        counted = counted & (labels.reshape(n) != IGNORED)
        # the mean over no sample is NaN, and so is its gradient: any class will do where none counts
        labels = torch.where(counted.any(), labels, labels.clamp(min=0))
    _check_padding(model, inputs)
    passes = TwoPasses(
        model,
        request,
        inputs,
        teacher=partial(_teacher_logits, model, request),
        student=partial(model.forward, **inputs, labels=labels if single else labels.float(), return_dict=True),
    )
    teacher = passes.teacher()
    layers_off = (request.switch or TeacherSwitch(model)).layers_off if request.head_only else nullcontext
    with _final_hidden(model, frozen=request.head_only) as captured, layers_off():
        outputs = passes.student()
    late = passes.late_teacher()
    teacher = _at_met(teacher if late is None else late, passes)
    logits = outputs.logits.reshape(n, -1)  # (N, D); DeBERTa's come out flat for regression
    batch = BatchLabels(labels, problem, counted)
    both = _with_teacher(logits, batch, passes.met)
    found = _Found(count=counted.sum())
    with torch.autocast(logits.device.type, enabled=False):  # it would take the covariance in half precision
        task = upcast(outputs.loss) * found.count  # the model's own loss, a mean
        task = _task(task, request, logits, batch)
        with request.part("token_terms"):
            if teacher is not None:
                found.consistency(request, both[0], teacher, both[1])
            if lambdas.diversity:
                found.diversity(
                    request, _rows(model, request, inputs, logits, captured, request.config.diversity_input)
                )
        with request.part("spectrum"):
            if lambdas.svd:
                found.spectrum(request, _rows(model, request, inputs, logits, captured, request.config.svd_input))
        weighted = {name: getattr(request.lambdas, name) * value for name, value in found.sums.items()}
        loss = task
        for value in weighted.values():
            loss = loss + value
    result: dict[str, Any] = {"loss": loss, "task": task.detach(), "count": found.count, **found.facts}
    result |= {name: value.detach() for name, value in found.sums.items()}
    result |= of_samples(request.measures, both[0], teacher, both[1])
    result["taught"] = _taught(both[1], passes.met)
    if request.return_logits:
        result["logits"] = logits
    if request.measure_shares:
        with request.part("shares"):
            factor = _factor_of_share(request.teacher_factor, found.count, result["taught"])
            result["shares"] = _shares(task, weighted, captured[0], factor)
    return StepOutput(**result)


def _at_met(teacher: Tensor | None, passes: TwoPasses) -> Tensor | None:
    """The teacher's logits (N, D), of the samples that are met; None where none is, or where there is no teacher."""
    return None if teacher is None else passes.at_met(teacher.reshape(len(main_input(passes.inputs)), -1))


def _with_teacher(logits: Tensor, batch: BatchLabels, met: MetRows | None) -> tuple[Tensor, BatchLabels]:
    """The logits (N, D) and labels of the samples that the teacher is met at."""
    if met is None:
        return logits, batch
    return of_rows(logits, met.met), batch._replace(
        values=of_rows(batch.values, met.met), counted=of_rows(batch.counted, met.met)
    )


def _taught(batch: BatchLabels, met: MetRows | None) -> Tensor | None:
    """How many samples count of those that are met, 0-d; None where all are."""
    return None if met is None else batch.counted.sum()


def _factor_of_share(factor: int, count: Tensor, taught: Tensor | None) -> Tensor:
    """What the norm of the consistency's gradient is divided by to be that of all samples at its average weight, 0-d.

    The gradient by one sample's states does not depend on another's, so that squares of norms add up over them.
    """
    if taught is None:
        return torch.ones((), device=count.device) * max(factor, 1)
    return (taught.clamp(min=1) / count.clamp(min=1)).sqrt() * max(factor, 1)


def _task(plain: Tensor, request: StepRequest, logits: Tensor, labels: BatchLabels) -> Tensor:
    """The sum of the samples' task losses in the form that is asked for, from logits (N, D).

    Each times its weight, (N,), or (N, D) for each of its labels. `plain`: the model's own sum, where neither is asked.
    """
    weights, form = request.task_weights, request.task_form
    check_form(form, labels.problem)
    if weights is None and form == PLAIN_TASK:
        return plain
    rows = task_rows(logits, labels.values, labels.problem, form)
    if weights is not None:
        check_task_weights(weights, labels.values)
        rows = rows * (weights.unsqueeze(1) if weights.ndim == 1 else weights).to(rows)
    return torch.where(labels.counted, rows.mean(dim=-1), 0.0).sum()


class _Found:
    """The terms of a micro-batch as sums over samples (differentiable), and what is to be said of them."""

    def __init__(self, count: Tensor) -> None:
        self.count = count
        self.sums: dict[str, Tensor] = {}
        self.facts: dict[str, Tensor] = {}

    def consistency(self, request: StepRequest, logits: Tensor, teacher: Tensor, batch: BatchLabels) -> None:
        config = request.config
        form, temperature = config.consistency or "kl", config.temperature or 1.0
        rows = consistency_of(logits, teacher, problem=batch.problem, form=form, temperature=temperature)
        self.sums["consistency"] = torch.where(batch.counted, rows, 0.0).sum()

    def diversity(self, request: StepRequest, batch: _Rows) -> None:
        value = diversity_of(batch.rows)
        self.sums["diversity"] = batch.rows.sum() * 0.0 if value is None else value * batch.weight
        self.facts["diversity_count"] = self._number(0.0 if value is None else batch.weight)

    def spectrum(self, request: StepRequest, batch: _Rows) -> None:
        config = request.config
        found = spectrum_of_samples(
            batch.rows,
            k=config.svd_top_k or 1,
            norm=config.svd_norm or "nuclear",
            centered=config.svd_input == "centered_logits",
        )
        self.sums["svd"] = batch.rows.sum() * 0.0 if found is None else found[0] * batch.weight
        self.facts["svd_count"] = self._number(0.0 if found is None else batch.weight)
        self.facts["svd_used_k"] = self.count.new_tensor(0 if found is None else found[1])

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.count.device)


class _Rows(NamedTuple):
    """A batch's matrix (N, D) in float32, and how many samples of the global batch its statistic stands for here."""

    rows: Tensor
    weight: float


def _rows(
    model: PreTrainedModel,
    request: StepRequest,
    inputs: dict[str, Any],
    logits: Tensor,
    captured: list[Tensor],
    which: str | None,
) -> _Rows:
    rows = upcast(features(model, captured[0], inputs) if which == "features" else logits)
    rows = rows if request.counts else rows[:0]
    if not request.config.gather_batch_statistics:
        return _Rows(rows, float(rows.shape[0]))
    rows = gather_rows(rows)
    return _Rows(rows, rows.shape[0] / world_size())


def features(model: PreTrainedModel, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
    """The final hidden state that the head reads: (B, L, d) -> (B, d).

    The last token of a decoder, the first of an encoder, or the mean over tokens where the model pools so (ModernBERT).
    """
    if reads_last_token(model):
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        ids = inputs.get("input_ids")  # embeddings do not say what is padding: the model takes the last position then
        last = hidden.shape[1] - 1 if ids is None else last_tokens(model, ids).to(hidden.device)
        return hidden[rows, last]
    if getattr(model.config, "classifier_pooling", "cls") == "mean":
        mask = inputs.get("attention_mask")
        mask = hidden.new_ones(hidden.shape[:2]) if mask is None else mask.to(hidden)
        return (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return hidden[:, 0]


def problem_of(model: Any, labels: Tensor) -> str:
    """The kind of task, by transformers' rule where the model's config leaves it open; then written there.

    Left open, DeBERTa takes several labels a sample for a distribution over classes, and rounds its outputs to whole
    numbers where scores are whole numbers.
    """
    config = model.config
    if config.problem_type is None:
        whole = not labels.is_floating_point()
        if not whole and config.num_labels > 1 and labels.numel() == labels.shape[0]:
            raise ValueError(
                f"labels {tuple(labels.shape)} are no whole numbers, and the model has {config.num_labels} "
                "classes: write each class as an integer, or load the model with num_labels=1 for a score."
            )
        if whole and config.num_labels > 1 and labels.ndim > 1 and labels[0].numel() > 1:
            raise ValueError(
                f"labels {tuple(labels.shape)} are whole numbers, and problem_type is None, which takes those for one "
                "class a sample: for several labels a sample write problem_type='multi_label_classification' in the "
                "model's config, and labels as floats."
            )
        config.problem_type = REGRESSION if config.num_labels == 1 else SINGLE_LABEL if whole else MULTI_LABEL
    return str(config.problem_type)


def check_fit(labels: Tensor, problem: str, num_labels: int) -> None:
    """Refuses classes (N,) that a model has not, or labels (N, D) of another number than it has.

    Of classes on an accelerator the values are not asked: that would wait for it.

    Raises:
        ValueError: names the labels and what they have to be.
    """
    if problem == MULTI_LABEL and labels.shape[1:] != (num_labels,):
        raise ValueError(
            f"labels {tuple(labels.shape)}, and the model has num_labels={num_labels}: write so many a sample, or load "
            "it with another num_labels."
        )
    if problem != SINGLE_LABEL or labels.device.type != "cpu":
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= num_labels))]
    if wrong.numel():
        raise ValueError(
            f"labels: {int(wrong[0])} is no class of this model, which has num_labels={num_labels}: write whole "
            f"numbers from 0 to {num_labels - 1} (-100: does not count), or load it with another num_labels."
        )


def samples_of(labels: Tensor, items: Tensor | int) -> Tensor | int:
    """What a host counted as items, entries of `labels` over a global batch, as samples: (B, D) labels count once."""
    return items if labels.ndim < 2 else items // labels[0].numel()


def _teacher_logits(model: PreTrainedModel, request: StepRequest, inputs: dict[str, Any]) -> Tensor:
    if request.teacher is not None:
        with torch.no_grad():
            return request.teacher(**inputs, return_dict=True).logits
    with (request.switch or TeacherSwitch(model)).off():
        return model.forward(**inputs, return_dict=True).logits


@contextmanager
def _final_hidden(model: PreTrainedModel, *, frozen: bool) -> Iterator[list[Tensor]]:
    """Inside: the backbone's final hidden states are kept; `frozen`: it runs without gradient (a linear probe)."""
    captured: list[Tensor] = []
    enabled = torch.is_grad_enabled()

    def before(module: nn.Module, args: Any) -> None:
        torch.set_grad_enabled(False)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(output[0])
        torch.set_grad_enabled(enabled)

    handles = [model.base_model.register_forward_hook(after)]
    if frozen:
        handles.append(model.base_model.register_forward_pre_hook(before))
    try:
        yield captured
    finally:
        torch.set_grad_enabled(enabled)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _check_padding(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Once a model: a decoder's head must read a token, not padding of another id than its config says.

    Raises:
        ValueError: names pad_token_id.
    """
    if model in _padding_seen or not reads_last_token(model):
        return
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or mask is None or bool(mask.all()):
        return
    _padding_seen.add(model)
    read = mask.gather(1, last_tokens(model, ids).unsqueeze(1))
    if not bool(read.all()):
        padding = sorted(set(ids[mask == 0].tolist()))
        raise ValueError(
            f"pad_token_id={model.config.get_text_config().pad_token_id} in the model's config, but the batches are "
            f"padded with {padding[0]}: the head would read padding. Set model.config.pad_token_id = {padding[0]}."
        )


def _shares(task: Tensor, weighted: dict[str, Tensor], hidden: Tensor, factor: Tensor) -> Tensor:
    """Norm of each weighted term's gradient over the task's, with respect to the final hidden states: (3,)."""

    def norm(value: Tensor | None) -> Tensor:
        if value is None or not value.requires_grad:
            return torch.zeros((), device=task.device)
        gradient = torch.autograd.grad(value, hidden, retain_graph=True, allow_unused=True)[0]
        return torch.zeros((), device=task.device) if gradient is None else gradient.float().norm().to(task.device)

    terms = [norm(weighted.get(name)) for name in ("consistency", "diversity", "svd")]
    terms[0] = terms[0] / factor.to(terms[0])
    return torch.stack(terms) / norm(task).clamp_min(torch.finfo(torch.float32).tiny)
