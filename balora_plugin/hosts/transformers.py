"""BaLoraTrainer: transformers' Trainer with BA-LoRA."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from ..adapter.build import get_ba_lora_model
from ..adapter.config import BaLoraConfig
from ..anchors.reading import check_anchors
from ..config import as_regularizers
from ..pretrained.attention import check_attention
from ..pretrained.lm_head import check_head
from ..training.checks.arguments import check_arguments
from ..training.checks.model import resolve
from ..training.trainer import BaLoraTrainerMixin

_TOKENIZER, _MODEL_INIT = 3, 4  # their places behind model and args, for a caller that names nothing


class BaLoraTrainer(BaLoraTrainerMixin, Trainer):
    """[`transformers.Trainer`] with the BA-LoRA objective, for causal language models and sequence classification.

    Args (beside the Trainer's own):
        peft_config: A BaLoraConfig (or any PEFT config) to wrap `model` with, or what each call of `model_init` makes;
            or let either be a wrapped model.
        regularizers, teacher_model: See [`BaLoraTrainerMixin`].
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self._adapter = peft_config
        self._wanted = kwargs.get("regularizers")
        self._arguments = args
        terms = self._wanted or getattr(peft_config, "regularizers", None)
        if terms is not None:
            given = positional[_TOKENIZER] if len(positional) > _TOKENIZER else kwargs.get("processing_class")
            check_anchors(as_regularizers(terms).anchor_data, given)
        if model is not None:
            model = self.wrap_ba_lora_model(model)
        elif peft_config is not None and kwargs.get("model_init") is None and len(positional) <= _MODEL_INIT:
            raise ValueError(
                "peft_config is given, but model is None: pass the bare pre-trained model or model_init=..., or leave "
                "peft_config out."
            )
        super().__init__(model, args, *positional, **kwargs)

    def wrap_ba_lora_model(self, model: nn.Module) -> nn.Module:
        """Returns the model with the adapter of `peft_config` on it, checked before the SVDs; any other as it is."""
        args, config = self._arguments, copy.deepcopy(self._adapter)  # PEFT writes into what it is given
        if config is not None:
            if isinstance(model, PeftModel):
                raise ValueError(
                    "peft_config is given, but model is a PeftModel: pass the bare pre-trained model, or leave "
                    "peft_config out."
                )
            model = self._wrapped(model, config)
        if isinstance(model, PeftModel) and args is not None and args.gradient_checkpointing:
            model.enable_input_require_grads()  # checkpointing over frozen embeddings needs an input with a gradient
        return model

    def _wrapped(self, model: Any, config: PeftConfig) -> nn.Module:
        if not isinstance(config, BaLoraConfig):
            return get_peft_model(model, config)
        if self._arguments is not None:
            check_arguments(self._arguments)
            check_attention(model, self._arguments)
        terms = as_regularizers(self._wanted or config.regularizers)
        if resolve(model, terms, adapter_follows=True).task == "nlg":  # before the SVDs
            check_head(model)
        self.ba_lora_head_checked = True
        return get_ba_lora_model(model, config)
