"""What Axolotl does before it puts a LoRA on a model, done before ours: its patches of PEFT, its choice of layers."""

from __future__ import annotations

import logging
from typing import Any

import axolotl
from axolotl.loaders import adapter as theirs
from torch import nn
from transformers import PreTrainedModel

from ...adapter.config import BaLoraConfig
from ...adapter.targets import beyond_all_linear
from ...pretrained.backbone import language_model_of
from ...pretrained.classifier_head import is_classifier

logger = logging.getLogger("axolotl.balora_plugin")

# what Axolotl calls private: only here
PATCHES = ("_patch_peft_clippable_linear", "_peft_will_auto_convert_target_params", "_patch_peft_param_wrapper_dropout")


def patch_peft(model: PreTrainedModel, config: BaLoraConfig) -> None:
    """Patches PEFT as Axolotl's own `load_lora` does: clipped linear layers, and dropout beside fused experts.

    Experts that PEFT's own reading of the targets finds get no dropout, the layers beside them do.

    Raises:
        ImportError: this Axolotl has no such patches.
    """
    missing = [name for name in PATCHES if not callable(getattr(theirs, name, None))]
    if missing:
        raise ImportError(
            f"axolotl {axolotl.__version__} has no axolotl.loaders.adapter.{missing[0]}: adapter: ba_lora needs "
            "axolotl 0.19, or a newer balora-plugin."
        )
    theirs._patch_peft_clippable_linear()
    if config.lora_dropout and theirs._peft_will_auto_convert_target_params(model, config.to_lora_config()):
        logger.warning(
            "lora_dropout: %s acts on the linear layers, not on the fused experts, whose inputs PEFT cannot drop "
            "(as with adapter: lora).",
            config.lora_dropout,
        )
        theirs._patch_peft_param_wrapper_dropout()


def target_modules(cfg: Any, model: PreTrainedModel) -> str | list[str] | None:
    """`lora_target_modules`, and with `lora_target_linear` the linear layers that Axolotl names, without the LM head.

    Without those that PEFT cannot adapt, too; of a multimodal model those of its language model. Of a classifier: every
    linear layer but the head's; with neither key its default targets (None).
    """
    modules: Any = cfg.lora_target_modules or []
    if is_classifier(model):  # Axolotl's rule would take the head in
        return "all-linear" if cfg.lora_target_linear else modules or None
    if not cfg.lora_target_linear:
        return modules if isinstance(modules, str) else list(modules)
    named = [modules] if isinstance(modules, str) else list(modules)
    return sorted({*named, *_linear_names(model)})


def _linear_names(model: PreTrainedModel) -> set[str]:
    """The last names of the linear layers; whole ones for layers that are called as the head is."""
    names = set(theirs.find_all_linear_names(language_model_of(model))) - set(beyond_all_linear(model))
    head = model.get_output_embeddings()
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    for of_head in [name.rpartition(".")[2] for name, each in layers.items() if each is head]:
        if of_head in names:
            alike = {name for name, each in layers.items() if name.endswith(f".{of_head}") and each is not head}
            names = (names - {of_head}) | alike
    return names
