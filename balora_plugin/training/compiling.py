"""When a trainer compiles with the backend `ba_lora`: `compile=True` of the adapter, or the host's own argument."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..objective.causal_lm_terms import backbone_pass, student_pass
from ..objective.install import without_input_hooks
from ..objective.request import CompiledPasses

logger = logging.get_logger(__name__)

BACKEND = "ba_lora"
LAYERS = "layers"
_NAMED = "ACCELERATE_DYNAMO_BACKEND"


class Asked(NamedTuple):
    """That a host's own arguments ask for the backend, and `torch_compile_mode` beside."""

    mode: str | None = None


def take_backend(
    arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Asked | None]:
    """`torch_compile_backend="ba_lora"` out of a Trainer's arguments (model, args, ...), and what it asked for.

    accelerate knows a fixed list of backends and refuses any other name, so that the trainer compiles by itself. The
    caller's TrainingArguments stay as they are: a copy without the setting takes their place.
    """
    given: Any = keywords.get("args", arguments[1] if len(arguments) > 1 else None)
    if not getattr(given, "torch_compile", False) or getattr(given, "torch_compile_backend", None) != BACKEND:
        return arguments, keywords, None
    given = copy.copy(given)
    asked = Asked(getattr(given, "torch_compile_mode", None))
    given.torch_compile, given.torch_compile_backend, given.torch_compile_mode = False, None, None
    if os.environ.get(_NAMED, "").lower() == BACKEND:  # Axolotl writes it there too, for all later runs
        del os.environ[_NAMED]
    if "args" in keywords:
        return arguments, {**keywords, "args": given}, asked
    return (arguments[0], given, *arguments[2:]), keywords, asked


def compiled_passes(
    args: Any, warn: Callable[[str, str], None], how: bool | str = True, mode: str | None = None
) -> CompiledPasses:
    """Teacher and student as one graph each, or by layer; eager, said once by `warn`, where they cannot be.

    Args:
        how: `compile` of the adapter's config: True, or "layers".
        mode: Inductor's, as torch.compile takes it.

    Raises:
        ValueError: arguments that rule it out, by name.
    """
    if getattr(args, "torch_compile", False):
        raise ValueError(
            f"compile={how!r} in the adapter's config and torch_compile=True would compile the model twice: keep "
            f"compile={how!r} (teacher, student and terms) and set torch_compile to False, or write "
            f"torch_compile_backend={BACKEND!r}, which is the same."
        )
    if how == LAYERS:
        from ..compile.layers import CompiledLayers

        layers = CompiledLayers(warn, mode)

        def by_layer(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
            with layers.inside(model):
                return backbone_pass(model, inputs)

        return CompiledPasses(by_layer, layers=layers)
    if getattr(args, "gradient_checkpointing", False) and (args.gradient_checkpointing_kwargs or {}).get(
        "use_reentrant"
    ):
        raise ValueError(
            "compile=True does not work with reentrant checkpointing: set gradient_checkpointing_kwargs="
            f"{{'use_reentrant': False}}, or compile={LAYERS!r}."
        )
    from ..compile import Compiled  # imports dynamo, which takes seconds

    teacher, student = (
        Compiled(function, warn, mode=mode, around=without_input_hooks) for function in (backbone_pass, student_pass)
    )
    return CompiledPasses(teacher, student)


def compile_for_the_host(model: nn.Module, asked: Asked) -> None:
    """Compiles (in place) the model of a run without terms, whose loss is the host's own, with our backend."""
    from ..compile import or_eagerly

    def failed(reason: str) -> None:
        logger.warning(
            f"BA-LoRA: torch_compile_backend={BACKEND!r} does not work here, so training goes on without it: {reason}"
        )

    model.compile(backend=or_eagerly(failed, asked.mode))
