"""Asks a language model on four tokens whether its task is the one that the terms stand beside: the next token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ..distributed import is_sharded
from ..pretrained.quantised import is_quantised_linear, quantised_layers_stay_in_training_mode
from .run_state import RunState

logger = logging.get_logger(__name__)

_LOSS = 1e-2  # relative: a reduced precision's rounding stays below
_QUANTISED = 5e-2  # 8-bit layers take the scales of the whole batch


def warn_of_the_task(run: RunState) -> None:
    """Says once that a model has a loss of its own, which is not trained, or that it sees the tokens it predicts.

    Three passes without gradient of the pre-trained model; not of one that is sharded, or on the meta device.
    """
    model = run.model
    if is_sharded(model) or any(p.is_meta for p in model.parameters()):
        return
    with torch.no_grad(), run.switch.off(), quantised_layers_stay_in_training_mode(model):
        try:
            _ask(run)
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
    own, task = outputs(ids, labels=ids).loss, F.cross_entropy(logits[0, :-1], ids[0, 1:])
    if own is not None and abs(float(own) - float(task)) > _LOSS * abs(float(task)):
        run.warn(
            "own_loss",
            f"{type(model).__name__} has a loss of its own ({float(own):.4g} on a probe, where the next tokens' "
            f"cross-entropy is {float(task):.4g}), which BA-LoRA does not train: its task loss is the cross-entropy. "
            "Weigh that with weigh_ba_lora_task, or add to it in compute_loss (docs/design/training.md, 'Writing a "
            "trainer of your own').",
        )


def _rounding(model: Any) -> float:
    if any(is_quantised_linear(module) for module in model.modules()):
        return _QUANTISED
    return max(1e-5, 4 * max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()))
