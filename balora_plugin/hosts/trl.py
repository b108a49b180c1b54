"""BaLoraSFTTrainer: TRL's SFTTrainer with BA-LoRA."""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, TrainingArguments
from transformers.processing_utils import ProcessorMixin
from trl import SFTConfig, SFTTrainer, clone_chat_template
from trl.trainer.utils import create_model_from_path

from ..adapter.build import get_ba_lora_model
from ..adapter.config import BaLoraConfig
from ..adapter.target_names import check_names
from ..anchors.reading import check_anchors
from ..config import RegularizerConfig, as_regularizers
from ..fused.loss import PLAIN_TASK
from ..memory.twin import hollow
from ..objective.batches import main_input
from ..objective.request import StepOutput
from ..pretrained.attention import check_attention, check_flash
from ..pretrained.lm_head import check_head
from ..settings import as_path
from ..training.checks.arguments import check_arguments, check_loss_function
from ..training.checks.data import check_cacheable, check_rows, has_images
from ..training.checks.model import resolve
from ..training.checks.teacher import check_teacher
from ..training.trainer import BaLoraTrainerMixin

_ROWS = 64  # clone_chat_template resizes the embeddings to a multiple of this


class BaLoraSFTTrainer(BaLoraTrainerMixin, SFTTrainer):
    """A drop-in for [`trl.SFTTrainer`]: with `peft_config=BaLoraConfig(...)` it trains with BA-LoRA.

    With a plain LoraConfig or none, and no `regularizers`, it is exactly SFTTrainer. `regularizers=` puts the terms on
    a plain LoRA (teacher: adapter off) or on full fine-tuning (teacher: `teacher_model`, or a `teacher_cache`); see
    [`BaLoraTrainerMixin`].

    Raises:
        ValueError: settings that would replace or bypass the loss, by name.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        args: SFTConfig | TrainingArguments | None = None,
        *positional: Any,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        regularizers = kwargs.get("regularizers") or getattr(peft_config, "regularizers", None)
        if regularizers is not None:
            regularizers = as_regularizers(regularizers)
            check_rows(kwargs.get("train_dataset"))
            check_cacheable(kwargs.get("train_dataset"), regularizers)
            _check_settings(model, args, peft_config, regularizers, kwargs)
            check_anchors(regularizers.anchor_data, kwargs.get("processing_class", "the model's own"))
        self._wrap: _Wrap | None = None
        if isinstance(peft_config, BaLoraConfig):
            _check_names(model, peft_config)
            model, args = _with_template(*_load(model, args, kwargs), kwargs)
            self._wrap = _Wrap(peft_config, as_regularizers(regularizers), args)
            model = self.wrap_ba_lora_model(model)
            peft_config = None
        super().__init__(model, args, *positional, peft_config=peft_config, **kwargs)

    def wrap_ba_lora_model(self, model: nn.Module) -> nn.Module:
        """Returns the model with the adapter of `peft_config` on it, checked before the SVDs; any other as it is."""
        if self._wrap is None:
            return model
        config, regularizers, args = self._wrap
        if isinstance(model, PeftModel):
            raise ValueError(
                "peft_config is given, but model is already a PeftModel: pass the bare pre-trained model, or leave "
                "peft_config out."
            )
        if args is not None:
            check_attention(model, args)
        self.check_ba_lora_task(resolve(model, regularizers, adapter_follows=True))
        check_head(model)
        self.ba_lora_head_checked = True
        return get_ba_lora_model(model, config, autocast_adapter_dtype=not _is_plain_zero3(model, args))

    def check_ba_lora_task(self, config: RegularizerConfig) -> None:
        _refuse_classification(config.task)

    def extend_ba_lora_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {**inputs, "output_router_logits": True} if getattr(self, "aux_loss_enabled", False) else inputs

    def record_ba_lora_metrics(self, out: StepOutput, inputs: dict[str, Any], training: bool) -> None:
        """SFTTrainer's own entropy, mean_token_accuracy, num_tokens and aux_loss, which its compute_loss would keep."""
        assert out.count is not None and out.entropy is not None and out.correct is not None
        metrics = self._metrics["train" if training else "eval"]
        gather = self.accelerator.gather_for_metrics
        count = gather(out.count).sum()
        valid = bool(count > 0)
        metrics["entropy"].append((gather(out.entropy).sum() / count).item() if valid else 0.0)
        metrics["mean_token_accuracy"].append((gather(out.correct).sum() / count).item() if valid else 0.0)
        if training:
            if "attention_mask" in inputs:
                tokens = inputs["attention_mask"].sum()
            else:  # padding-free and packed batches
                tokens = out.count.new_tensor(main_input(inputs).shape[:2].numel())
            self._total_train_tokens += gather(tokens).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        if out.aux_loss is not None and getattr(self, "aux_loss_enabled", False):
            metrics["aux_loss"].append(gather(out.aux_loss.detach()).mean().item())


class _Wrap(NamedTuple):
    """What a bare model is wrapped with, and checked for."""

    adapter: BaLoraConfig
    regularizers: RegularizerConfig
    args: Any


def _refuse_classification(task: str) -> None:
    if task == "nlu":
        raise ValueError(
            "task='nlu', or a classification model, in SFTTrainer, which trains language models: use "
            "balora_plugin.BaLoraTrainer; for a language model write task='nlg' (or 'auto')."
        )


def _check_settings(
    model: Any, args: Any, peft_config: Any, regularizers: RegularizerConfig, kwargs: dict[str, Any]
) -> None:
    """Refuses, before any model loads, what cannot work."""
    _refuse_classification(regularizers.task)
    if not isinstance(model, PeftModel) and regularizers.resolved("nlg").lambda_consistency:
        check_teacher(peft_config, kwargs.get("teacher_model"), cached=regularizers.teacher_cache is not None)
    if args is not None:
        check_arguments(args)
        attention = (getattr(args, "model_init_kwargs", None) or {}).get("attn_implementation")
        check_flash(attention, f"attn_implementation={attention!r} in model_init_kwargs", "'sdpa' there")
        path = as_path("chat_template_path", getattr(args, "chat_template_path", None))
        if path is not None:
            args.chat_template_path = path  # TRL takes text alone
    check_loss_function(kwargs.get("compute_loss_func"), PLAIN_TASK)
    template = _tokenizer_of_template(args)
    if template is not None:
        if isinstance(kwargs.get("processing_class"), ProcessorMixin) or has_images(kwargs.get("train_dataset")):
            raise ValueError(
                f"chat_template_path={template!r} is a tokenizer, whose template TRL cannot clone into a multimodal "
                "processor: write it to a .jinja file, and name that."
            )
        _check_template(template, model, kwargs.get("processing_class"))


def _check_names(model: Any, adapter: BaLoraConfig) -> None:
    """Looks the adapter's names up in the model that a name stands for, by its config, before its weights are read."""
    if not isinstance(model, str):
        return
    try:
        base = hollow(AutoModelForCausalLM.from_config, AutoConfig.from_pretrained(model))
    except Exception:  # of another kind, with code of its own, or not there: the model itself is looked at
        return
    check_names(adapter, base)


def _tokenizer_of_template(args: Any) -> str | None:
    """Returns the tokenizer whose chat template `chat_template_path` names; None for a file, and for nothing."""
    path = getattr(args, "chat_template_path", None)
    return None if path is None or (os.path.isfile(path) and path.endswith((".jinja", ".j2"))) else path


def _with_template(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Clones another tokenizer's template as TRL does, but before the model is wrapped.

    TRL's resizing, though it changes no size, sets requires_grad of all that is inside modules_to_save.
    """
    path = _tokenizer_of_template(args)
    if path is None:
        return model, args
    tokenizer = kwargs.get("processing_class")
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    model, kwargs["processing_class"], _ = clone_chat_template(model, tokenizer, path)
    args = copy.copy(args)
    args.chat_template_path = args.eos_token = None  # the template's own token is in force
    return model, args


def _check_template(path: str, model: Any, tokenizer: Any) -> None:
    """Refuses another tokenizer's chat template where TRL, which clones it, would change the model's vocabulary.

    TRL adds that tokenizer's special tokens and resizes the embeddings to the next multiple of 64: with neither to do
    the template and the end-of-sequence token are all that changes.

    Raises:
        ValueError: names the path, what would change, and what to write.
    """
    key = f"chat_template_path={path!r}"
    try:
        source = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:120]
        raise ValueError(f"{key} is no .jinja file, and no tokenizer that loads ({why}): name one of both.") from None
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model if isinstance(model, str) else model.config._name_or_path)
    known = tokenizer.get_vocab()
    needed = [token.content for token in source.added_tokens_decoder.values()] + [source.eos_token]
    new = sorted({token for token in needed if token is not None and token not in known})
    if new:
        raise ValueError(
            f"{key} would add {len(new)} tokens ({', '.join(new[:3])}) to the vocabulary, of which the teacher has no "
            "rows: clone it beforehand (trl.clone_chat_template), save model and tokenizer, train on these with "
            "modules_to_save=['embed_tokens', 'lm_head']; or name a .jinja file whose tokens are there."
        )
    if isinstance(model, str):
        rows = AutoConfig.from_pretrained(model).get_text_config().vocab_size
    else:
        rows = model.get_input_embeddings().num_embeddings
    wanted = -(-len(known) // _ROWS) * _ROWS
    if rows != wanted:
        raise ValueError(
            f"{key} would resize the embeddings from {rows} to {wanted} rows, which the teacher shares: write its "
            f"template to a file, open('chat.jinja', 'w').write(AutoTokenizer.from_pretrained({path!r}).chat_template)"
            f", and chat_template_path='chat.jinja', eos_token={source.eos_token!r}."
        )


def _load(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A model given by name, loaded as SFTTrainer loads it; its arguments are then spent."""
    if not isinstance(model, str):
        return model, args
    if args is None:
        args = SFTConfig(f"{model.rstrip('/').split('/')[-1]}-SFT")
    settings = dict(getattr(args, "model_init_kwargs", None) or {})
    quantization = kwargs.pop("quantization_config", None)
    if quantization is not None:
        if "quantization_config" in settings:
            raise ValueError("quantization_config is given twice: as a trainer argument and in args.model_init_kwargs.")
        settings["quantization_config"] = quantization
    settings.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    source = {key: settings[key] for key in ("trust_remote_code", "revision") if settings.get(key) is not None}
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None
    loaded = create_model_from_path(model, **settings)
    if kwargs.get("processing_class") is None:  # at the model's own revision
        # text needs no image library
        kind = AutoProcessor if has_images(kwargs.get("train_dataset")) else AutoTokenizer
        kwargs["processing_class"] = kind.from_pretrained(model, **source)
    args = copy.copy(args)  # the caller may use his for another run
    if hasattr(args, "model_init_kwargs"):
        args.model_init_kwargs = None
    return loaded, args


def _is_plain_zero3(model: Any, args: Any) -> bool:
    """ZeRO-3 over an unquantised base needs adapters in the base's dtype (the same rule as SFTTrainer's)."""
    plugin = getattr(args, "deepspeed_plugin", None)
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    return plugin is not None and plugin.zero_stage == 3 and not quantised
