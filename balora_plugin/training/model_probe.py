"""Asks a model on a few tokens whether its task is the one that the terms stand beside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ..distributed import is_sharded
from ..fused.loss import PLAIN_TASK
from ..objective.classification_terms import MULTI_LABEL, REGRESSION, SINGLE_LABEL, task_rows
from ..pretrained.quantised import is_quantised_linear, quantised_layers_stay_in_training_mode
from .run_state import RunState

logger = logging.get_logger(__name__)

_LOSS = 1e-2  # relative: a reduced precision's rounding stays below
_QUANTISED = 5e-2  # 8-bit layers take the scales of the whole batch


def warn_of_the_task(run: RunState) -> None:
    """Says once that a model has a loss of its own, which is not trained, or that it sees the tokens it predicts.

    A language model: three passes without gradient of the pre-trained model, a classifier: one. Not of one
    that is sharded, or on the meta device.
    """
    model = run.model
    if is_sharded(model) or any(p.is_meta for p in model.parameters()):
        return
    with torch.no_grad(), run.switch.off(), quantised_layers_stay_in_training_mode(model):
        try:
            (_ask if run.config.task == "nlg" else _ask_classifier)(run)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            # what a model cannot do with four tokens and nothing else is no reason to stop
            logger.debug("BA-LoRA: %s was not asked for its loss: %s", type(model).__name__, error)


def _ask(run: RunState) -> None:
    model, config = run.model, run.model.config.get_text_config()
    ids = torch.arange(1, 5, device=model.device).unsqueeze(0) % config.vocab_size
    extra = {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}

    def outputs(ids: Tensor, **more: Any) -> Any:
        return model(input_ids=ids, use_cache=False, **extra, **more)

    logits = outputs(ids).logits.float()
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 5) % config.vocab_size
    moved = float((outputs(changed).logits.float() - logits)[:, :-1].abs().max() / logits.abs().max().clamp_min(1e-6))
    if moved > _rounding(model):
        run.warn(
            "sees_later",
            f"{type(model).__name__} sees the tokens that it is to predict: its logits move by {moved:.1e} with a "
            "token behind them, so its task loss teaches it to copy. Load a causal language model (is_decoder=True in "
            "the config, where the architecture has both).",
        )
    _compare(
        run,
        outputs(ids, labels=ids).loss,
        F.cross_entropy(logits[0, :-1], ids[0, 1:]),
        "the next tokens' cross-entropy",
    )


def _ask_classifier(run: RunState) -> None:
    """On two samples of different labels: weights of classes cancel in the mean over one."""
    model, config = run.model, run.model.config
    ids = torch.arange(1, 9, device=model.device).reshape(2, 4) % config.get_text_config().vocab_size
    count, problem = config.num_labels, config.problem_type
    kind = problem or (REGRESSION if count == 1 else SINGLE_LABEL)
    labels = torch.tensor([0, count - 1], device=model.device)
    if kind == REGRESSION:
        labels = torch.tensor([[0.0], [2.0]], device=model.device).expand(2, count).contiguous()
    elif kind == MULTI_LABEL:
        labels = F.one_hot(labels, count).float()
    try:
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    finally:
        config.problem_type = problem  # which the model's forward sets where there is none
    task = task_rows(found.logits.float(), labels.reshape(2, -1), kind, PLAIN_TASK).mean()
    _compare(run, found.loss, task, f"the labels' {'squared error' if kind == REGRESSION else 'cross-entropy'}")


def _compare(run: RunState, own: Tensor | None, task: Tensor, name: str) -> None:
    """Says once that a model's own loss is not the task's, `name`."""
    if own is None or abs(float(own) - float(task)) <= _LOSS * abs(float(task)):
        return
    run.warn(
        "own_loss",
        f"{type(run.model).__name__} has a loss of its own ({float(own):.4g} on a probe, where {name} is "
        f"{float(task):.4g}), which BA-LoRA does not train: its task loss is the latter. Weigh that with "
        "weigh_ba_lora_task, or add to it in compute_loss (docs/design/training.md, 'Writing a trainer of your own').",
    )


def _rounding(model: Any) -> float:
    if any(is_quantised_linear(module) for module in model.modules()):
        return _QUANTISED
    return max(1e-5, 4 * max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()))
