"""Refusals of a model, or of its tokenizer, that the terms cannot work with."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ...config import RegularizerConfig
from ...pretrained.backbone import is_multimodal
from ...pretrained.classifier_head import check_head_trains, head_names, is_classifier, reads_last_token
from ...pretrained.lm_head import read_head
from ...pretrained.quantised import is_quantised_linear


def resolve(
    model: PreTrainedModel, regularizers: RegularizerConfig, *, adapter_follows: bool = False
) -> RegularizerConfig:
    """The effective settings for this model; `adapter_follows`: a bare one that will be wrapped.

    Raises:
        ValueError: the model is not one that BA-LoRA trains.
    """
    config = regularizers.resolved(task_of(model, regularizers))
    check_model(model, config, adapter_follows=adapter_follows)
    return config


def task_of(model: PreTrainedModel, regularizers: RegularizerConfig) -> str:
    """ "nlg" for a causal language model, "nlu" for a *ForSequenceClassification; anything else is refused.

    Raises:
        ValueError: another kind of model, or a task that is not this model's; names both and what to write.
    """
    name = type(model).__name__
    if is_classifier(model):
        if regularizers.task == "nlg":
            raise ValueError(
                f"task='nlg' with {name}, which classifies: write task='nlu' (or 'auto'), or load the model with "
                "AutoModelForCausalLM."
            )
        return "nlu"
    if "ForMaskedLM" in name:
        raise ValueError(
            f"{name} is a masked language model: BA-LoRA needs a causal LM (AutoModelForCausalLM, task='nlg') or a "
            "classifier (AutoModelForSequenceClassification, task='nlu')."
        )
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(
            f"{name} is not a causal language model, nor one for sequence classification: load it with "
            "AutoModelForCausalLM (task='nlg') or AutoModelForSequenceClassification (task='nlu')."
        )
    if regularizers.task == "nlu":
        raise ValueError(
            f"task='nlu' with {name}, a causal language model: load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=...), or write task='nlg' (or 'auto')."
        )
    return "nlg"


def check_model(model: PreTrainedModel, config: RegularizerConfig, *, adapter_follows: bool = False) -> None:
    """Architectures and heads that the terms cannot work with."""
    if config.task == "nlu" and is_multimodal(model):
        raise ValueError(
            f"{type(model).__name__} is a multimodal classifier, which BA-LoRA does not train: use its text-only class "
            "(AutoModelForSequenceClassification on the text config), or a text-only model."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, which BA-LoRA does not train: use a causal LM."
        )
    if config.task == "nlu":
        _check_classifier(model, adapter_follows=adapter_follows)
        return
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "target_modules matches the LM head: the terms read its weight directly and would ignore an adapter. "
            "Remove it from target_modules."
        )
    head = read_head(model)
    if config.lambda_svd and head.weight.device.type == "mps":
        raise ValueError("the SVD term needs float64, which MPS does not have: set lambda_svd=0.")
    if (config.lambda_svd or config.monitor) and config.svd_layout == "flattened" and config.svd_input != "features":
        for what, present in (
            ("a head bias", head.bias is not None),
            ("a softcap", head.softcap is not None),
            ("a head that trains", head.trains and not adapter_follows),
        ):
            if present:
                raise ValueError(f"svd_layout='flattened' does not work with {what}: use svd_layout='rows'.")


def _check_classifier(model: PreTrainedModel, *, adapter_follows: bool) -> None:
    if reads_last_token(model) and model.config.get_text_config().pad_token_id is None:
        raise ValueError(
            f"pad_token_id=None in the config of {type(model).__name__}, whose head reads the last token that is not "
            "padding: set model.config.pad_token_id = tokenizer.pad_token_id."
        )
    for name in head_names(model):
        if any(is_quantised_linear(module) for module in getattr(model, name).modules()):
            raise ValueError(
                f"{name}, a part of {type(model).__name__}'s head, is quantised, so it could not train: load the model "
                f"with llm_int8_skip_modules={head_names(model)} in its BitsAndBytesConfig."
            )
    if not adapter_follows:
        check_head_trains(model)


def check_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """A decoder's head finds its token by the config's pad_token_id, which must be what batches are padded with.

    Raises:
        ValueError: names both.
    """
    pads, expects = getattr(tokenizer, "pad_token_id", None), model.config.get_text_config().pad_token_id
    if reads_last_token(model) and pads is not None and pads != expects:
        raise ValueError(
            f"pad_token_id={expects} in the model's config, but the tokenizer pads with {pads}: the head would read "
            f"padding. Set model.config.pad_token_id = {pads}."
        )
