"""Compiling by layer: each kind of decoder layer once, in the place of one graph of the whole model."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .fallback import COMPILE_ERRORS, GRAPHS, compile_alone, or_eagerly, whole_graphs, why

GRAPHS_OF_A_KIND = 8  # teacher and student, states that need gradients (below the first layer) and not, lengths


class CompiledLayers:
    """Lets the repeated layers of models run compiled inside a pass of ours, and wherever else they are trained.

    In evaluation and generation they run as they are. A compilation that fails is said once; what is not compiled by
    then runs eagerly.
    """

    def __init__(self, warn: Callable[[str, str], None], mode: str | None = None) -> None:
        self.warn = warn
        self.failed = False  # in part at least
        self._backend = or_eagerly(self._say, mode)
        self._inside = False
        self._models: list[nn.Module] = []
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Runs the layers of `model` compiled inside the block, with gradients or without."""
        self._install(model)
        before, self._inside = self._inside, True
        try:
            with whole_graphs():
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
        graphs = max(GRAPHS, GRAPHS_OF_A_KIND * len({_kind(layer) for layer in layers}))
        for layer in layers:
            if hasattr(vars(layer).get("forward"), "compiled_by"):  # of an earlier trainer
                _take_off(layer)
            self._install_on(layer, graphs)

    def _install_on(self, layer: nn.Module, graphs: int) -> None:
        own = vars(layer).get("forward")  # somebody's hook
        function: Callable[..., Any] = type(layer).forward
        if own is not None:

            def function(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
                return own(*args, **kwargs)

        compiled = self._compile(function, graphs)
        eager = False  # this layer alone: the others' states are those that a backward pass under way recomputes

        @functools.wraps(function)
        def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal eager
            # the second condition: what checkpointing computes again in the backward pass
            wanted = self._inside or (self_.training and torch.is_grad_enabled())
            if eager or not wanted:
                return function(self_, *args, **kwargs)
            try:
                return compiled(self_, *args, **kwargs)
            except COMPILE_ERRORS as error:
                reason = why(error)
            result = function(self_, *args, **kwargs)  # dynamo raises the function's own errors as its own
            eager = True
            self._say(reason)
            return result

        vars(forward)["compiled_by"], vars(forward)["replaced"] = self, own
        layer.forward = types.MethodType(forward, layer)

    def _compile(self, function: Callable[..., Any], graphs: int) -> Callable[..., Any]:
        """Compiles one function for all layers of a class: their parameters are inputs of its graphs."""
        if function not in self._compiled:
            self._compiled[function] = compile_alone(function, self._backend, graphs)
        return self._compiled[function]

    def _say(self, reason: str) -> None:
        self.failed = True
        self.warn("compile", f"compile: layers does not work here, so training goes on without it: {reason}")


def _kind(layer: nn.Module) -> Any:
    """Returns what layers have to share for their graphs to be the same, as far as parameters say it."""
    return type(layer), tuple((name, p.shape, p.dtype) for name, p in layer.named_parameters())


def outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Finds the layers that repeat: transformers' own for checkpointing, none inside another."""
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
