"""How a model's own forward takes the objective: one more keyword, everything else unchanged."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .causal_lm import causal_lm_step
from .request import Step, StepRequest


def install(model: PreTrainedModel, step: Step | None = None) -> None:
    """Lets a model's forward take the keyword `ba_lora`. Idempotent; other calls are unchanged.

    `step` answers such a call: [`causal_lm_step`] for causal language models, or another family's. The patched function
    looks its model up by `self`, so a deep copy of the model runs on its own weights.
    """
    if getattr(model.forward, "takes_ba_lora", False):
        return
    current = model.__dict__.get("forward")
    original: Callable[..., Any]
    if current is None:
        original = type(model).forward
    elif isinstance(current, types.MethodType) and current.__self__ is model:
        original = current.__func__
    else:

        def original(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return current(*args, **kwargs)

    def forward(self: nn.Module, *args: Any, ba_lora: StepRequest | None = None, **kwargs: Any) -> Any:
        if ba_lora is None:
            return original(self, *args, **kwargs)
        return (step or causal_lm_step)(self, ba_lora, kwargs)

    # without it hosts would strip the columns they do not see (input_ids) and generate() would refuse real inputs
    vars(forward)["__signature__"] = _unbound_signature(model)
    vars(forward)["takes_ba_lora"] = True
    model.forward = types.MethodType(forward, model)


@contextmanager
def without_input_hooks(model: PreTrainedModel) -> Iterator[None]:
    """Inside, embeddings are without the hooks that make them require gradients: no graph can hold them, and
    non-reentrant checkpointing needs none. Not by disable_input_require_grads(), which forgets all but those of the
    last of several enablings, and for good: a pass that is not compiled after all may need them.
    """
    hooks = model.get_input_embeddings()._forward_hooks
    before = list(hooks.items())
    for key, hook in before:
        if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
            del hooks[key]
    try:
        yield
    finally:
        hooks.clear()
        hooks.update(before)


def _unbound_signature(model: PreTrainedModel) -> inspect.Signature:
    signature = inspect.signature(model.forward)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return signature.replace(parameters=[own, *signature.parameters.values()])
