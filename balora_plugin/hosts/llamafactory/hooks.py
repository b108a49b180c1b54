"""What is put in the place of LLaMA-Factory's own: three globals of its modules, and its run function.

The one file that touches what LLaMA-Factory calls its own; `check_release` says which releases were looked at.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import llamafactory.model.adapter as host_adapter
import llamafactory.train.sft.workflow as host_workflow
from llamafactory.train import tuner
from packaging.version import Version
from peft import LoraConfig, PeftModel
from torch import nn

from ...adapter.build import get_ba_lora_model
from ...adapter.config import BaLoraConfig
from ...adapter.model import BaLoraModel
from ...checkpoint.location import AdapterFiles
from ...checkpoint.settings import read_settings
from ...config import RegularizerConfig
from ...pretrained.lm_head import check_head
from ...training.checks.model import resolve
from ...training.trainer import BaLoraTrainerMixin
from .checks import Plan

TESTED_LLAMAFACTORY = ("0.9.5", "0.9.6")  # from, below
_WHERE_IT_IS = {  # of the modules here, what is replaced
    "get_peft_model": host_adapter,
    "PeftModel": host_adapter,
    "CustomSeq2SeqTrainer": host_workflow,
}


def check_release(version: str | None = None) -> None:
    """Refuses a LLaMA-Factory in which what is replaced stands elsewhere, warns of one that was not tested.

    Raises:
        ImportError: names what is missing, and the release to install.
    """
    version = metadata.version("llamafactory") if version is None else version
    missing = [name for name, module in _WHERE_IT_IS.items() if not hasattr(module, name)]
    if missing or Version(version) < Version(TESTED_LLAMAFACTORY[0]):
        lacks = f", which has no {', '.join(missing)} where it is looked for" if missing else ""
        raise ImportError(
            f"balora-plugin was written for LLaMA-Factory {TESTED_LLAMAFACTORY[0]}, found {version}{lacks}: "
            f'pip install "llamafactory=={TESTED_LLAMAFACTORY[0]}"'
        )
    if Version(version) >= Version(TESTED_LLAMAFACTORY[1]):
        warnings.warn(
            f"balora-plugin was tested with LLaMA-Factory {TESTED_LLAMAFACTORY[0]}, found {version}.", stacklevel=2
        )


@contextmanager
def globals_replaced(plan: Plan) -> Iterator[None]:
    """Lets LLaMA-Factory build, load and train what a plan says inside the block, and gives its globals back."""
    terms = RegularizerConfig.from_dict(plan.terms)
    trainer = host_workflow.CustomSeq2SeqTrainer
    ours = {
        "get_peft_model": _builder(terms, plan),
        "PeftModel": _loader(terms, plan),
        "CustomSeq2SeqTrainer": type("BaLoraCustomSeq2SeqTrainer", (BaLoraTrainerMixin, trainer), {}),
    }
    before = {name: getattr(module, name) for name, module in _WHERE_IT_IS.items()}
    try:
        for name, module in _WHERE_IT_IS.items():
            setattr(module, name, ours[name])
        yield
    finally:
        for name, module in _WHERE_IT_IS.items():
            setattr(module, name, before[name])


def run_with(plan: Plan, run: Callable[..., None] | None = None) -> None:
    """Trains by LLaMA-Factory's own run function; `run`: that function, where something else stands in its place."""
    with globals_replaced(plan):
        (run or tuner.run_exp)(plan.arguments)


def _builder(terms: RegularizerConfig, plan: Plan) -> Callable[..., PeftModel]:
    def build(model: Any, peft_config: LoraConfig, *args: Any, **kwargs: Any) -> PeftModel:
        values = {each.name: getattr(peft_config, each.name) for each in dataclasses.fields(LoraConfig) if each.init}
        config = BaLoraConfig(**{**values, **plan.adapter}, regularizers=terms)
        if resolve(model, terms, adapter_follows=True).task == "nlg":  # before the SVDs
            check_head(model)
        return get_ba_lora_model(model, config, *args, **kwargs)

    return build


def _loader(terms: RegularizerConfig, plan: Plan) -> type:
    class Loader(PeftModel):
        """PEFT's own for what is merged or only evaluated; an adapter that goes on training is ours."""

        @classmethod
        def from_pretrained(cls, model: nn.Module, model_id: str, *args: Any, **kwargs: Any) -> PeftModel:
            if not kwargs.get("is_trainable"):
                return PeftModel.from_pretrained(model, model_id, *args, **kwargs)
            files = AdapterFiles.from_arguments(model_id, kwargs)
            if read_settings(files) is None:
                raise ValueError(
                    f"adapter_name_or_path: {model_id} is no adapter of BA-LoRA, which is what trains here: write "
                    "create_new_adapter: true (it is merged, and a new adapter trained), or train it by "
                    "llamafactory-cli."
                )
            loaded = BaLoraModel.from_pretrained(model, model_id, is_trainable=True, **files.arguments())
            loaded.peft_config["default"].regularizers = terms
            loaded.peft_config["default"].compile = plan.adapter.get("compile", False)
            return loaded

    return Loader
