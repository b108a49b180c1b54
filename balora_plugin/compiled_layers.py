"""Compiling by layer: each kind of decoder layer once, in the place of one graph of the whole model."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .compile.backend import COMPILE_ERRORS, why, with_backward

# a kind of layer has a graph for the teacher and one for the student, for states that need gradients (below the first
# layer) and not, for one length and for all: past dynamo's own limit of 8 where there are kinds (sliding windows)
GRAPHS = 32
_SETTINGS = inspect.signature(torch.compile).parameters


class CompiledLayers:
    """Lets the repeated layers of models run compiled inside a pass of ours, and wherever else they are trained.

    In evaluation and generation they run as they are. A compilation that fails is said once; all layers then run
    eagerly.
    """

    def __init__(self, warn: Callable[[str, str], None]) -> None:
        self.warn = warn
        self.failed = False
        self._inside = False
        self._models: list[nn.Module] = []
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Inside, the layers of `model` run compiled, with gradients or without."""
        if not self.failed:
            self._install(model)
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def remove(self) -> None:
        """Gives the layers their own forward back."""
        for model in self._models:
            for layer in outermost_layers(model):
                if getattr(vars(layer).get("forward"), "compiled_by", None) is self:
                    _take_off(layer)
        self._models = []

    def _install(self, model: nn.Module) -> None:
        if any(model is known for known in self._models):
            return
        self._models.append(model)
        layers = list(outermost_layers(model))
        if not layers:
            self.failed = True
            name = type(model).__name__
            self.warn("compile", f"compile: layers finds none in {name}, which runs eagerly: write compile: true.")
        for layer in layers:
            if hasattr(vars(layer).get("forward"), "compiled_by"):  # of an earlier trainer
                _take_off(layer)
            self._install_on(layer)

    def _install_on(self, layer: nn.Module) -> None:
        own = vars(layer).get("forward")  # somebody's hook
        function: Callable[..., Any] = type(layer).forward
        if own is not None:

            def function(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return own(*args, **kwargs)

        compiled = self._compile(function)

        @functools.wraps(function)
        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # the second condition: what checkpointing computes again in the backward pass
            wanted = self._inside or (self_.training and torch.is_grad_enabled())
            if self.failed or not wanted:
                return function(self_, *args, **kwargs)
            try:
                return compiled(self_, *args, **kwargs)
            except COMPILE_ERRORS as error:
                reason = why(error)
            result = function(self_, *args, **kwargs)  # dynamo raises the function's own errors as its own
            self.failed = True
            self.warn("compile", f"compile: layers does not work here, so training goes on without it: {reason}")
            return result

        vars(forward)["compiled_by"], vars(forward)["replaced"] = self, own
        layer.forward = types.MethodType(forward, layer)

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """One for all layers of a class: their parameters are inputs of its graphs."""
        if function not in self._compiled:
            known = "recompile_limit" in _SETTINGS  # older PyTorch: dynamo's own limit
            limit: dict[str, Any] = {"recompile_limit": GRAPHS} if known else {}
            self._compiled[function] = torch.compile(function, backend=with_backward, **limit)
        return self._compiled[function]


def outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that repeat: transformers' own for checkpointing, none inside another."""
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from outermost_layers(child)


def _take_off(layer: nn.Module) -> None:
    replaced = vars(layer)["forward"].replaced
    if replaced is None:
        del layer.forward
    else:
        layer.forward = replaced
