"""ms-swift's tuner: its `lora_*` keys as a BaLoraConfig, and adapters written and read by our classes."""

from __future__ import annotations

import os
from typing import Any

import torch
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner

from ...adapter.build import get_ba_lora_model
from ...adapter.config import BaLoraConfig
from ...adapter.model import BaLoraModel
from ...pretrained.classifier_head import is_classifier
from ...pretrained.lm_head import check_head
from ...training.checks.model import resolve
from .block import read_block, terms_and_source
from .errors import refuse_arguments
from .multimodal import of_multimodal, trained_encoders
from .names import VARIABLE
from .starts import swift_start


def adapter_of(args: Any, model: Any) -> BaLoraConfig:
    """Returns ms-swift's `lora_*` keys as a BaLoraConfig with the terms of BA_LORA."""
    terms, source = terms_and_source(read_block(os.environ.get(VARIABLE)))
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    whole = [name for name in get_modules_to_save(args, model, args.task_type) if name != "v_head" or name in names]
    return BaLoraConfig(
        task_type=args.task_type.upper(),
        r=int(args.lora_rank),
        lora_alpha=int(args.lora_alpha),
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        modules_to_save=whole or None,
        target_modules=get_target_modules(args, model),
        target_parameters=args.target_parameters,
        init_lora_weights=swift_start(args.init_weights),
        start_from=source,
        regularizers=terms,
    )


class BaLoraTuner(PeftTuner):
    """`tuner_type: ba_lora`."""

    @staticmethod
    def prepare_model(args: Any, model: torch.nn.Module) -> torch.nn.Module:
        """Checks the bare model, before the SVDs, and puts the adapter on it."""
        config = adapter_of(args, model)
        check_kind_of_model(args.task_type, model)
        refuse_arguments(of_multimodal(args, model, config.regularizers.teacher_cache))
        if resolve(model, config.regularizers, adapter_follows=True).task == "nlg":
            check_head(model)
        wrapped = get_ba_lora_model(model, config)
        refuse_arguments(trained_encoders(wrapped))
        return wrapped

    @staticmethod
    def from_pretrained(model: torch.nn.Module, model_id: str, **kwargs: Any) -> torch.nn.Module:
        """Loads an adapter to go on with as BA-LoRA, with the terms that are asked for now; else as PEFT does."""
        if not kwargs.get("is_trainable"):
            return PeftTuner.from_pretrained(model, model_id, **kwargs)
        wrapped = BaLoraModel.from_pretrained(model, model_id, **kwargs)
        refuse_arguments(trained_encoders(wrapped))
        wrapped.peft_config["default"].regularizers, _ = terms_and_source(read_block(os.environ.get(VARIABLE)))
        return wrapped

    @staticmethod
    def save_pretrained(
        model: torch.nn.Module,
        save_directory: str,
        state_dict: dict[str, Any] | None = None,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes the adapter; `state_dict` is what an engine has gathered, which ms-swift's own PeftTuner drops."""
        kwargs.setdefault("selected_adapters", ["default"])
        saves: Any = model
        saves.save_pretrained(save_directory, safe_serialization=safe_serialization, state_dict=state_dict, **kwargs)


def check_kind_of_model(task_type: str, model: Any) -> None:
    """Refuses a classifier that ms-swift has made of a language model by patching its forward.

    Raises:
        ValueError: names the class, and what to do.
    """
    if task_type == "seq_cls" and not is_classifier(model):
        raise ValueError(
            f"task_type: seq_cls: transformers has no classifier for {type(model).__name__}, of which ms-swift makes "
            "one by a forward of its own that the terms do not know: take another model, or tuner_type: lora."
        )
