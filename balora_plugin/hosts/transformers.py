"""BaLoraTrainer: transformers' Trainer with BA-LoRA."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from ..adapter.build import get_ba_lora_model
from ..adapter.config import BaLoraConfig
from ..config import as_regularizers
from ..pretrained.attention import check_attention
from ..pretrained.lm_head import check_head
from ..training.checks.arguments import check_arguments
from ..training.checks.model import resolve
from ..training.trainer import BaLoraTrainerMixin


class BaLoraTrainer(BaLoraTrainerMixin, Trainer):
    """[`transformers.Trainer`] with the BA-LoRA objective, for causal language models and sequence classification.

    Args (beside the Trainer's own):
        peft_config: A BaLoraConfig (or any PEFT config) to wrap `model` with; or pass a wrapped model.
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
        if peft_config is not None:
            if model is None or isinstance(model, PeftModel):
                raise ValueError(
                    f"peft_config is given, but model is {'None' if model is None else 'a PeftModel'}: pass the "
                    "bare pre-trained model, or leave peft_config out."
                )
            if isinstance(peft_config, BaLoraConfig):
                if args is not None:
                    check_arguments(args)
                    check_attention(model, args)
                terms = as_regularizers(kwargs.get("regularizers") or peft_config.regularizers)
                if resolve(model, terms, adapter_follows=True).task == "nlg":  # before the SVDs
                    check_head(model)
                self.ba_lora_head_checked = True
                model = get_ba_lora_model(model, peft_config)
            else:
                model = get_peft_model(model, peft_config)
        if isinstance(model, PeftModel) and args is not None and args.gradient_checkpointing:
            model.enable_input_require_grads()  # checkpointing over frozen embeddings needs an input with a gradient
        super().__init__(model, args, *positional, **kwargs)
