"""Says once where a BA-LoRA model trains in a loop that never asks for its terms: a stock Trainer's, say."""

from __future__ import annotations

import weakref
from typing import NamedTuple

from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from ..distributed import process_rank
from ..pretrained.classifier_head import is_classifier
from ..weights.in_words import weights_in_words
from .config import BaLoraConfig, active_config

logger = logging.get_logger(__name__)


class _Seen(NamedTuple):
    """The model's first trained tensor when it was last looked at: its version and its sum."""

    version: int
    sum: float

    @classmethod
    def of(cls, value: Tensor) -> _Seen:
        return cls(value._version, float(value.detach().double().abs().sum()))


_seen: weakref.WeakKeyDictionary[nn.Module, _Seen | None] = weakref.WeakKeyDictionary()  # None: nothing left to say


def say_unasked_terms(model: PeftModel) -> None:
    """Called where a model is put into training mode, as Trainers do before each micro-batch.

    A warning, once: the adapter has moved since the last call, it has terms, and no BA-LoRA trainer has set the model
    up. Loops that set the mode once, evaluations and generation never come here twice with weights that moved.
    """
    if model in _seen and _seen[model] is None:
        return
    trained = _watched(model)
    if trained is None:
        return
    now = _Seen.of(trained)
    before = _seen.setdefault(model, now)
    if before == now:
        return
    _seen[model] = None
    if process_rank() == 0:
        terms = ", ".join(_weights(model))
        logger.warning(
            f"BA-LoRA: this model is trained by a loop that leaves its terms out: {terms} do nothing. Use "
            "balora_plugin.BaLoraSFTTrainer or BaLoraTrainer in the place of SFTTrainer or Trainer (any other: "
            "class T(BaLoraTrainerMixin, ThatTrainer)); for PiSSA alone set every lambda to 0 in the adapter's "
            "regularizers."
        )


def _watched(model: PeftModel) -> Tensor | None:
    """The first tensor that trains of a model whose terms nobody has asked for; None where there is nothing to say."""
    base = model.get_base_model()
    if getattr(base.forward, "takes_ba_lora", False) or not _weights(model):
        return None
    found = next((p for name, p in model.named_parameters() if "lora_" in name and p.requires_grad), None)
    if found is None or found.device.type == "meta" or not found.numel() or hasattr(found, "full_tensor"):
        return None  # sharded: a sum of it would be a collective
    return found


def _weights(model: PeftModel) -> list[str]:
    """The weights of the active adapter's terms that are not 0, with their values."""
    config = active_config(model)
    if not isinstance(config, BaLoraConfig):
        return []
    return weights_in_words(config.regularizers.resolved("nlu" if is_classifier(model.get_base_model()) else "nlg"))
