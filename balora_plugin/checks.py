"""What BA-LoRA cannot train with, refused by name before any training: arguments, model, teacher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .adapter.config import BaLoraConfig
from .checkpoint import INIT_FILE, read_settings
from .config import RegularizerConfig
from .head import read_head
from .identity import is_sharded
from .nlu.heads import check_head_trains, head_names, is_classifier, reads_last_token, teacher_head
from .quantised import is_quantised_linear
from .whole import STATE_FILE

# starts that rewrite the base weights: switching such an adapter off gives a residual model, not the pre-trained one
MUTATING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_arguments(args: Any) -> None:
    """Training arguments that would replace or bypass the loss, refused by name.

    Raises:
        ValueError: names the argument, its value and what to write.
    """
    refused: list[tuple[str, Any, str]] = [
        ("label_smoothing_factor", 0.0, "the consistency term already softens the targets; set it to 0"),
        ("use_liger_kernel", False, "it replaces the forward that computes the terms; set it to False"),
        ("loss_type", ("nll", "chunked_nll"), "BA-LoRA's task loss is the cross-entropy; leave it at its default"),
    ]
    for key, allowed, remedy in refused:
        value = getattr(args, key, None)
        if value is None or value in (allowed if isinstance(allowed, tuple) else (allowed,)):
            continue
        raise ValueError(f"{key}={value!r} does not work with BA-LoRA: {remedy}.")
    if getattr(args, "n_gpu", 1) > 1:
        raise ValueError(
            f"n_gpu={args.n_gpu}: nn.DataParallel is not supported. Launch with `accelerate launch` or `torchrun`, or "
            "show one GPU with CUDA_VISIBLE_DEVICES."
        )
    parallelism = getattr(args, "parallelism_config", None)
    for key in ("cp_enabled", "sp_enabled", "tp_enabled"):
        if getattr(parallelism, key, False):
            raise ValueError(f"parallelism_config.{key}=True does not work with BA-LoRA yet: use DDP or FSDP.")


def check_saving(accelerator: Any) -> None:
    """Ways to save under FSDP that leave no adapter behind, and say nothing.

    Raises:
        ValueError: names the key and what to write.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    kind = str(getattr(plugin, "state_dict_type", ""))
    if "SHARDED" in kind or "LOCAL" in kind:
        raise ValueError(
            f"fsdp_state_dict_type={kind.rpartition('.')[2]}: save_model would write no adapter. Write "
            "fsdp_state_dict_type: FULL_STATE_DICT (the adapter alone is gathered)."
        )


def check_counted(dataset: Any) -> None:
    """Refuses training data of which no label counts: every loss would be 0, and nothing trained.

    Reads rows until one counts, which where all is well is the first; streams, and rows without labels, are not read.

    Raises:
        ValueError: names the labels and the usual reasons.
    """
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return
    for index in range(len(dataset)):
        row = dataset[index]
        labels = row.get("labels") if isinstance(row, Mapping) else None
        if labels is None:
            return
        labels = torch.as_tensor(labels)  # a classifier's has no dimension
        if labels.ndim != 1 or not labels.numel() or bool(labels[1:].ne(-100).any()):
            return
    if len(dataset):
        raise ValueError(
            f"labels: all are -100 in all {len(dataset)} rows of the training data, so no token counts: look for a "
            "chat template that marks no answer, for prompts longer than the sequence length, or train on the prompts "
            "too (train_on_inputs: true; completion_only_loss=False)."
        )


def as_regularizers(value: Any) -> RegularizerConfig:
    """`value` as a RegularizerConfig; a dict of its fields works too."""
    if isinstance(value, dict):
        return RegularizerConfig.from_dict(value)
    if not isinstance(value, RegularizerConfig):
        raise TypeError(f"regularizers={value!r} must be a RegularizerConfig or a dict of its fields.")
    return value


_OF_ANY_ADAPTER = ("adapter_config.json", STATE_FILE)  # of a checkpoint that a Trainer has finished


def check_checkpoint(adapter: Any, directory: str) -> None:
    """Refuses to resume a BA-LoRA checkpoint into a plain LoRA: its optimizer state is that of rank r, its file of 2r.
    And the reverse.

    Raises:
        ValueError: names the checkpoint and the remedy.
    """
    settings = read_settings(directory) if os.path.isdir(directory) else None
    has = {name: os.path.isfile(os.path.join(directory, name)) for name in (*_OF_ANY_ADAPTER, INIT_FILE)}
    if settings is None and all(has[name] for name in _OF_ANY_ADAPTER) and not has[INIT_FILE]:
        if isinstance(adapter, BaLoraConfig) and adapter.delta:
            raise ValueError(
                f"{directory} is a checkpoint of another adapter than BA-LoRA, which this run trains: resume one of a "
                "BA-LoRA run, or start with another output_dir."
            )
        return
    if settings is None or not settings["delta_form"] or (isinstance(adapter, BaLoraConfig) and adapter.delta):
        return
    raise ValueError(
        f"{directory} is a BA-LoRA checkpoint, but this trainer's adapter is {type(adapter).__name__}: resume it with "
        "peft_config=BaLoraConfig.from_pretrained(checkpoint). (PeftModel.from_pretrained loads it as a plain LoRA, to "
        "start a new run from.)"
    )


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


def check_teacher(
    adapter: Any, teacher_model: nn.Module | None, *, cached: bool = False, model: nn.Module | None = None
) -> None:
    """`cached`: a teacher_cache is filled before the weights move, which is enough in full fine-tuning. `model`: the
    base model with its adapters, where there is one already.

    Raises:
        ValueError: there is no pre-trained model to be had; names the setting and what to pass.
    """
    if teacher_model is not None or (adapter is None and cached):
        return
    if adapter is None:
        cache = "" if is_classifier(model) else " set teacher_cache=<a directory> (filled before the first step),"
        raise ValueError(
            "lambda_consistency > 0 in full fine-tuning has no adapter to switch off for the teacher: pass "
            f"teacher_model=<the pre-trained model>,{cache} or set lambda_consistency=0."
        )
    if getattr(adapter, "is_prompt_learning", False):
        raise ValueError(f"{type(adapter).__name__} cannot be switched off for the teacher: pass teacher_model=...")
    if model is not None:
        _check_frozen_base(model)
    if isinstance(adapter, BaLoraConfig):
        return
    start = str(getattr(adapter, "init_lora_weights", "")).lower()
    if start.startswith(MUTATING_STARTS):
        raise ValueError(
            f"init_lora_weights={start!r} rewrites the base weights, so switching the adapter off gives its residual "
            "model, not the pre-trained one: use BaLoraConfig (the same start in delta form), or pass teacher_model=..."
        )
    for key, neutral in (("bias", "none"), ("trainable_token_indices", None)):
        if getattr(adapter, key, neutral) not in (neutral, None):
            raise ValueError(
                f"{key}={getattr(adapter, key)!r} trains base parameters that the teacher shares: leave it at "
                f"{neutral!r}, or pass teacher_model=..."
            )


def _check_frozen_base(model: nn.Module) -> None:
    """Refuses base parameters that train beside the adapter: the teacher, which shares them, would move with them.

    Adapters, and the copies that modules_to_save trains, are switched off for the teacher; what they stand on is not.
    """
    switched_off: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            kept = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kept = module.original_module
        else:
            continue
        switched_off |= {id(p) for p in module.parameters()} - {id(p) for p in kept.parameters()}
    moving = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in switched_off]
    if moving:
        more = f" and {len(moving) - 1} more" if len(moving) > 1 else ""
        owner = moving[0].rpartition(".")[0].removesuffix(".base_layer").rpartition(".")[2]
        raise ValueError(
            f"{moving[0]}{more} trains beside the adapter: with the adapter switched off the model would not be the "
            f"pre-trained one any more. Freeze it (requires_grad_(False)), train a copy of its module "
            f"(modules_to_save=[{owner!r}]), pass teacher_model=..., or set lambda_consistency=0."
        )


def check_model(model: PreTrainedModel, config: RegularizerConfig, *, adapter_follows: bool = False) -> None:
    """Architectures and heads that the terms cannot work with."""
    model_config = model.config
    if hasattr(model_config, "vision_config") or hasattr(model_config, "audio_config"):
        raise ValueError(
            f"{type(model).__name__} is a multimodal (vision-language) model, which BA-LoRA does not train yet: use a "
            "text-only model."
        )
    if getattr(model_config, "is_encoder_decoder", False):
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
    if config.lambda_svd and config.svd_layout == "flattened" and config.svd_input != "features":
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


def check_classifier_run(
    model: PreTrainedModel, config: RegularizerConfig, args: Any, *, compiled: bool | str, fsdp: bool, deepspeed: bool
) -> None:
    """What does not go together in a classification run. `fsdp`, `deepspeed`: the engine that the host runs on.

    Raises:
        ValueError: names the key, its value and what to write.
    """
    if fsdp or deepspeed or is_sharded(model):  # a resumed run would give the teacher another random head
        key = "deepspeed" if deepspeed else "fsdp"
        given = getattr(args, key, None)
        raise ValueError(
            f"{key}={given if isinstance(given, str) and given else True!r} does not work with task='nlu': the "
            f"teacher's head is not restored under {'DeepSpeed' if deepspeed else 'FSDP'}. Leave {key} out (also of "
            "accelerate's config) and use DDP."
        )
    if compiled:
        raise ValueError(f"compile={compiled!r} is for causal language models: leave it out for a classifier.")
    if not config.head_warmup_steps:
        return
    if getattr(args, "ddp_find_unused_parameters", None) is False:
        raise ValueError(
            f"head_warmup_steps={config.head_warmup_steps} leaves the adapter without gradients for that long, which "
            "ddp_find_unused_parameters=False does not allow: set it to True, or leave it out."
        )


def check_same_head(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuses a second classifier as teacher whose head is not the student's first one.

    Raises:
        ValueError: names the tensor and the remedy.
    """
    theirs = teacher_head(teacher) if is_classifier(teacher) else {}
    for name, value in teacher_head(model).items():
        if name not in theirs or theirs[name].shape != value.shape or not torch.equal(theirs[name].to(value), value):
            raise ValueError(
                f"teacher_model has another head than the model ({name}): consistency would measure the distance of "
                "two random heads. Pass copy.deepcopy(model), or load both from one directory that holds the head."
            )


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
