"""Classification heads: which modules they are, that they train and are saved whole, and the teacher's copy of them.

The teacher of a classifier needs a head, and it has to be the student's first one: with another random head
"consistency" measures the distance of two random heads. It is the copy that PEFT's modules_to_save wrapper keeps, so
switching the adapter off switches to it. A resumed run builds its model with another random head; the teacher's is
therefore saved beside every adapter (`ba_lora_head.safetensors`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..checkpoint.names import HEAD_FILE

if TYPE_CHECKING:
    from peft import LoraConfig

# query and value, as PEFT's own defaults; for model types that PEFT has none for
DEFAULT_TARGETS: dict[str, list[str]] = {"modernbert": ["Wqkv"]}


def is_classifier(model: Any) -> bool:
    """Returns whether this is a transformers *ForSequenceClassification, or a subclass of one."""
    return any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__)


def head_names(model: Any) -> list[str]:
    """Returns the modules between a classifier's backbone and its outputs: its children with weights but the backbone.

    `classifier` (BERT, RoBERTa), `pooler` and `classifier` (DeBERTa), `head` and `classifier` (ModernBERT), `score`
    (decoders). A pooler inside the backbone (BERT's) is pre-trained and belongs to it. Empty for other models.
    """
    if not is_classifier(model):
        return []
    backbone = model.base_model
    return [
        name
        for name, child in model.named_children()
        if child is not backbone and any(True for _ in child.parameters())
    ]


def heads_of(model: Any) -> list[nn.Module]:
    """Returns the modules of [`head_names`], copies and first selves in one."""
    return [getattr(model, name) for name in head_names(model)]


def reads_last_token(model: Any) -> bool:
    """Returns whether this is a decoder, whose head scores the last token that is not padding."""
    return hasattr(model, "score") and not getattr(model.config, "is_encoder_decoder", False)


def last_tokens(model: Any, input_ids: Tensor) -> Tensor:
    """Returns where each row's last token is that is not padding, as the model's own head finds it: (B, L) -> (B,)."""
    pad = model.config.get_text_config().pad_token_id
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (positions * (input_ids != pad)).argmax(dim=-1)


def with_head(config: LoraConfig, model: Any) -> None:
    """Completes an adapter's config (in place) for a classifier: its task type, and the head among modules_to_save.

    Raises:
        ValueError: a task type of another kind of model.
    """
    if not is_classifier(model):
        return
    kind = getattr(config.task_type, "value", config.task_type)
    if kind not in (None, "SEQ_CLS"):
        raise ValueError(f"task_type={kind!r} with {type(model).__name__}: write 'SEQ_CLS', or leave it out.")
    config.task_type = "SEQ_CLS"
    names = head_names(model)
    given: list[str] = list(getattr(config, "modules_to_save", None) or [])
    config.modules_to_save = list(dict.fromkeys([*given, *names]))


def wrapped_heads(model: Any) -> dict[str, ModulesToSaveWrapper]:
    """Returns the head's modules that train as copies beside their first selves, by name; `model` is the classifier."""
    found = {name: getattr(model, name) for name in head_names(model)}
    return {name: module for name, module in found.items() if isinstance(module, ModulesToSaveWrapper)}


def half_heads(model: Any, adapter_name: str) -> dict[str, nn.Module]:
    """Returns the head's copies that train in half precision, by name."""
    copies = {
        name: module.modules_to_save[adapter_name]
        for name, module in wrapped_heads(model).items()
        if adapter_name in module.modules_to_save
    }
    half = (torch.bfloat16, torch.float16)
    return {name: copy for name, copy in copies.items() if any(p.dtype in half for p in copy.parameters())}


def train_in_float32(copy: nn.Module) -> None:
    """Casts a head's copy (in place), as PEFT does the factors: in bfloat16 small updates are rounded away.

    What it is given is cast too, so that the model still runs where there is no autocast.
    """
    copy.float()
    copy.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def check_head_trains(model: Any) -> None:
    """Refuses a classifier whose head, or a part of it, stays as it was initialised.

    Raises:
        ValueError: names the modules and what to write.
    """
    adapted = any("lora_" in name or "modules_to_save" in name for name, _ in model.named_parameters())
    for name in head_names(model):
        module = getattr(model, name)
        trains = any(p.requires_grad for p in module.parameters())
        if not trains or (adapted and not isinstance(module, ModulesToSaveWrapper)):
            raise ValueError(
                f"{name}, a part of {type(model).__name__}'s head, is not trained and saved whole: a head that was "
                "initialised at random would stay random, and be another one when the adapter is loaded. Write "
                f"task_type='SEQ_CLS' and modules_to_save={head_names(model)} in the adapter's config "
                "(BaLoraConfig does so by itself)."
            )


# --- the teacher's copy


def teacher_head(model: Any, gathered: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns the teacher's head: what `model` computes with while its adapters are off (or as it is, without any).

    `gathered`: the classifier's whole state dict; its own tensors may be split over processes.
    """
    wrapped, gathered = wrapped_heads(model), gathered or {}
    tensors: dict[str, Tensor] = {}
    for name in head_names(model):
        inner = f"{name}.original_module" if name in wrapped else name
        for key, value in model.get_submodule(inner).state_dict().items():
            tensors[f"{name}.{key}"] = gathered.get(f"{inner}.{key}", value).detach()
    return tensors


@torch.no_grad()
def set_teacher_head(model: Any, tensors: dict[str, Tensor], source: str) -> None:
    """Copies `tensors` into the teacher's head of `model`.

    Raises:
        ValueError: another head, by name or shape.
    """
    own = teacher_head(model)
    for name, value in own.items():
        given = tensors.get(name)
        if given is None or given.shape != value.shape:
            found = "no such tensor" if given is None else f"shape {tuple(given.shape)}"
            raise ValueError(
                f"{source} has {found} for {name} {tuple(value.shape)}: it belongs to a classifier with another head; "
                "load the model with the num_labels it was trained with."
            )
        value.copy_(given)


@torch.no_grad()
def hand_over(model: nn.Module, teacher: nn.Module | None, adapter_name: str) -> None:
    """Gives the student's head, as it is now, to the teacher: its copy in `model`, or a second model's own."""
    wrapped = wrapped_heads(model)
    state: dict[str, Tensor] = {}
    for name in head_names(model):
        module = wrapped[name].modules_to_save[adapter_name] if name in wrapped else getattr(model, name)
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    set_teacher_head(model if teacher is None else teacher, state, "the student")


def write_teacher_head(directory: str, model: Any, gathered: Mapping[str, Tensor] | None = None) -> bool:
    """Writes the teacher's head beside an adapter; False where there is none that training could have moved.

    `gathered`: see [`teacher_head`].
    """
    if not head_names(model):
        return False
    tensors = {name: value.cpu().contiguous() for name, value in teacher_head(model, gathered).items()}
    save_file(tensors, os.path.join(directory, HEAD_FILE), {"format": "pt"})
    return True


def read_teacher_head(path: str, model: Any) -> None:
    """Puts the teacher's head from `path` into `model`; see [`set_teacher_head`]."""
    set_teacher_head(model, load_file(path), path)
