"""The models that are compared: a base and its adapter in one model, two models, or one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor

from ..checkpoint.location import AdapterFiles
from ..checkpoint.lora_config import read_adapter_config
from ..checkpoint.names import CONFIG_FILE
from ..export.attach import attach
from ..export.lora_file import Adapter, foreign_options, read_adapter
from ..export.residual_start import raw_start
from ..pretrained import probe
from ..pretrained.quantised import quantised_layers_stay_in_training_mode
from ..pretrained.switch import TeacherSwitch

BASE, ADAPTER = "base", "adapter"
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CPT")


@dataclass(frozen=True)
class Side:
    """One of the models that are compared; `state` puts the model that it shares with another one into its own."""

    name: str
    model: Any
    state: Callable[[], Any] = nullcontext

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Gives the model, in eval mode and without gradients, as this side has it."""
        with torch.no_grad(), self.state(), quantised_layers_stay_in_training_mode(self.model):
            yield self.model


def check_adapter_form(directory: str) -> Mapping[str, Any] | None:
    """Returns an adapter's config, or None where `directory` is no adapter; called before a model is loaded.

    Raises:
        ValueError: an adapter that is no part of a causal language model's layers; says what to use instead.
    """
    path = AdapterFiles(directory).find(CONFIG_FILE)
    if path is None:
        return None
    config = read_adapter_config(path)
    kind, task = str(config.get("peft_type")), str(config.get("task_type") or "CAUSAL_LM")
    if kind in _PROMPTS:
        raise ValueError(
            f"peft_type={kind!r} in {directory!r} is a prompt and no change of layers, which cannot be switched off "
            "within a batch: evaluate it by python -m lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER."
        )
    if task != "CAUSAL_LM":
        raise ValueError(
            f"task_type={task!r} in {directory!r}: only causal language models are evaluated here; balora glue scores "
            "classifiers."
        )
    try:
        PeftConfig.from_pretrained(directory)
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # whatever its fields make of other types
        raise ValueError(f"{path} is not read by PEFT: {type(error).__name__}: {error}") from None
    return config


def ordinary_lora(directory: str, config: Mapping[str, Any]) -> Adapter | None:
    """Returns a LoRA whose update is scaling * B A, read from its files; None of another form of adapter.

    Raises:
        ValueError: damaged or edited files, or an adapter that belongs to a residual base.
    """
    if config.get("peft_type") != "LORA" or foreign_options(config):
        return None
    adapter = read_adapter(directory)
    start = raw_start(adapter)
    if start is not None:
        raise ValueError(
            f"{directory!r}: a raw {start} adapter belongs to a residual base: balora export {directory} --initial DIR "
            "converts it first."
        )
    return adapter


def with_adapter(base: Any, directory: str, adapter: Adapter | None, again: Callable[[], Any]) -> list[Side]:
    """Returns base and adapter as one model that is switched, where that is the base bit for bit.

    Otherwise the base is loaded once more, by `again`. `adapter`: as [`ordinary_lora`] read it; None: PEFT loads it.

    Raises:
        ValueError: the adapter does not fit the base.
    """
    before = _logits(base)
    if adapter is not None:
        wrapped = attach(base, adapter)
    else:
        try:
            wrapped = PeftModel.from_pretrained(base, directory).eval()
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{directory!r} does not fit this base: {' '.join(str(error).split())[:200]}") from None
    model = wrapped.get_base_model()
    switch = TeacherSwitch(wrapped)
    adapted = Side(ADAPTER, model, switch.on)
    alone = Side(BASE, model, switch.off)
    with alone.active():
        exact = torch.equal(before, _logits(model))
    return [alone if exact else Side(BASE, again()), adapted]


def _logits(model: Any) -> Tensor:
    """Returns logits (tokens, V) of sixteen fixed tokens, on the model's device."""
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    with torch.no_grad(), quantised_layers_stay_in_training_mode(model):
        return model(input_ids=probe.token_ids(vocabulary).to(device), use_cache=False).logits[0]
