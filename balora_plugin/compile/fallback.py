"""Functions of a model compiled by the backend, and what becomes of them where that fails."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import exc
from torch._dynamo.exc import TorchDynamoException
from torch._inductor import exc as inductor_exc
from torch.fx import GraphModule

from .backend import with_backward

# a run has a graph with a teacher and one without (teacher_interval), with the spectrum and without (schedules), for
# one row and for more, for one length and for all; and each again by kind of layer: past dynamo's own limit of 8
GRAPHS = 32
_SETTINGS = inspect.signature(torch.compile).parameters


def or_eagerly(failed: Callable[[str], None], mode: str | None = None) -> Callable[..., Any]:
    """Returns [`with_backward`] as a backend that calls failed(why) and runs eagerly what cannot be compiled.

    For graphs of a part of a model: those that were compiled stay so, in a backward pass that is under way too; no
    more are. Nothing is raised, so that dynamo's `suppress_errors`, which hosts set, hides nothing.
    """
    given_up = False

    def backend(module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        nonlocal given_up
        if not given_up:
            try:
                return with_backward(module, example_inputs, mode=mode)
            except Exception as error:  # compilers raise all kinds
                given_up = True
                failed(why(error))
        return module.forward

    return backend


# what dynamo and inductor raise where a function cannot be compiled; older PyTorch lacks some
_LIMIT: tuple[Any, ...] = tuple(filter(None, [getattr(exc, "FailOnRecompileLimitHit", None)]))
_INDUCTOR: tuple[Any, ...] = tuple(filter(None, [getattr(inductor_exc, "InductorError", None)]))
COMPILE_ERRORS: tuple[type[Exception], ...] = (TorchDynamoException, *_LIMIT, *_INDUCTOR)


def why(error: Exception) -> str:
    """Returns the first paragraph of one of COMPILE_ERRORS."""
    if isinstance(error, _LIMIT):
        return f"it would take more than {GRAPHS} graphs (shapes or settings that change all the time)"
    return " ".join(str(error).strip().split("\n\n")[0].split())[:300]


def compile_alone(function: Callable[..., Any], backend: Callable[..., Any], graphs: int, **settings: Any) -> Any:
    """Compiles a function with up to so many graphs of its own: dynamo counts by code object, over all trainers."""
    code = function.__code__.replace()
    own = types.FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    if "recompile_limit" in _SETTINGS:  # older PyTorch: dynamo's own limit
        settings["recompile_limit"] = graphs
    return torch.compile(own, backend=backend, **settings)


@contextmanager
def whole_graphs() -> Iterator[None]:
    """Keeps DDP from cutting graphs at its buckets: an adapter's gradients are few, our passes need the whole."""
    with dynamo_config.patch(optimize_ddp=False):
        yield


class Compiled:
    """A function of a model compiled as one graph by this backend, or as it is where that fails, said once.

    Forward and backward pass are compiled in the first call. Lengths that vary become dynamic at the second one.
    `around` is what the compiled call, and it alone, runs inside of; it is given the function's first argument.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        warn: Callable[[str, str], None],
        *,
        mode: str | None = None,
        around: Callable[[Any], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.function, self.warn, self.around = function, warn, around

        def ba_lora(module: GraphModule, example_inputs: Sequence[Any]) -> Any:  # dynamo's errors say its name
            return with_backward(module, example_inputs, mode=mode)

        self.compiled: Callable[..., Any] | None = compile_alone(function, ba_lora, GRAPHS, fullgraph=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is None:
            return self.function(*args, **kwargs)
        try:
            with self.around(args[0]), whole_graphs():
                return self.compiled(*args, **kwargs)
        except COMPILE_ERRORS as error:
            reason = why(error)
        result = self.function(*args, **kwargs)  # dynamo raises the function's own errors as its own: not beyond here
        self.compiled = None
        self.warn("compile", f"compile: true does not work here, so training goes on without it: {reason}")
        return result
