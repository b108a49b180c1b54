"""The teacher inside the student's call of each layer, so that both use a layer's weights while they are whole."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distributed import any_process, world_size
from .backbone import beside_the_language_model
from .decoder_layers import (
    given_states,
    has_states_alone,
    layers_of,
    skips_layers,
    standing_in,
    states_of,
    with_states,
)
from .shared_layers import SharedLayers
from .switch import TeacherSwitch

_MORE = "more"  # a layer's form that has tensors beside its states


_Part = Callable[[str], AbstractContextManager[None]]


def _uncounted(name: str) -> AbstractContextManager[None]:
    return nullcontext()


class ByLayer:
    """Lets each layer run the teacher's states, without gradient and adapter, before the student's, in one call.

    The teacher's own pass goes by the layers twice: before the student's, where it shows what each layer is to be given
    (masks, positions, its own shared keys and values), and after it, where it gets what the last layer has made.

    The first training pass proves it, without gradient: beside a student whose states are turned about, the teacher has
    to get the bits of its whole pass, and that student those that it has alone. What differs ends it.

    Args:
        model: The model inside any adapter; read once, before an engine wraps its layers.
        why: A reason that is known already why the teacher runs in a pass of its own.
        say: Is told why, once, where it does.

    Attributes:
        total: All layers.
        why: Why the teacher runs in a pass of its own, in words; "" where it does not, or may not have to.
        proven: Whether the first pass has shown that it does not have to.
        passes: How many of the teacher's passes ran inside the student's.
        bytes_once: Of the weights of the layers that ran so, added up: what is gathered less where they are sharded.
    """

    def __init__(self, model: PreTrainedModel, why: str = "", say: Callable[[str], None] = lambda why: None) -> None:
        self.model = model
        self.why = ""
        self.proven = False
        self.passes = 0
        self.bytes_once = 0
        self._say = say
        self._layers = layers_of(model)
        self._own = list(self._layers or ())  # engines put wrappers in their places
        self.total = len(self._own)
        self._sizes = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in self._own]
        self._switches: list[TeacherSwitch] = []
        self._forms: list[Any] = []  # what each layer's output is like, without its states
        self._marks: list[Any] = []  # what the layers' calls were like when it was shown
        self._walk: _Walk | None = None
        if why or (why := self._find()):
            self.stop(why)

    def serves(self, model: nn.Module, *, training: bool) -> bool:
        """Returns whether a pass of `model` may use this; evaluation proves nothing, so it comes after training."""
        return model is self.model and not self.why and (training or self.proven)

    def stop(self, why: str) -> None:
        """Gives the teacher its own pass from now on; every process of a job has to say it at the same pass."""
        if not self.why:
            self.why = why
            self._say(why)
        self.proven = False

    def renew(self) -> None:
        """Asks for a new proof: a training begins, and what was shown in an earlier one may hold no longer."""
        self.proven = False

    def begin(
        self, teacher: Callable[[], Tensor], student: Callable[[], Any], shared: SharedLayers | None = None
    ) -> bool:
        """Readies a micro-batch; returns whether the teacher's states will come by [`student`] and [`end`].

        Args:
            teacher: Runs the teacher's pass and returns its states.
            student: Runs the student's.
            shared: The layers that both compute once: the teacher runs them here, where they are shown to be one.
        """
        if self.proven and self._calls_now() != self._marks:
            self.stop("a hook has come to a layer, or gone")
        if self.why:
            return False
        if not self.proven:
            self._prove(teacher, student)
            return False
        if shared is not None and shared.proven:
            self._record(partial(shared.teacher, teacher), shared.first)
        else:
            self._record(teacher, 0)
        return self._goes_on()

    @contextmanager
    def student(self, part: _Part = _uncounted) -> Iterator[None]:
        """Inside: each layer's call runs the teacher's states first; `part` counts it as the teacher's cost."""
        walk, self._walk = self._walk, None
        assert walk is not None
        with self._inside(walk, part):
            yield
        self._walk = walk  # not after a pass that fails

    def end(self, teacher: Callable[[], Tensor]) -> Tensor:
        """Returns the teacher's states: `teacher()` goes by the layers, or runs them where the student left one out."""
        walk, self._walk = self._walk, None
        assert walk is not None
        if walk.broken or walk.following != self.total:
            self._differs_here(walk.broken or "the student's pass left a layer out")
            return teacher()
        self.passes += 1
        self.bytes_once += sum(self._sizes[walk.first :])
        return self._finish(teacher, walk)

    def _goes_on(self) -> bool:
        walk = self._walk
        assert walk is not None
        if walk.recorded == self.total and not walk.broken:
            return True
        self._walk = None
        self._differs_here(walk.broken or "the teacher's pass left a layer out")
        return False

    def _differs_here(self, why: str) -> None:
        """Ends it for what one batch alone did; one process of several would gather other layers than the others."""
        if world_size() > 1:
            raise RuntimeError(
                f"teacher_pass='by_layer': {why} in this batch, and not in the first one. With several processes the "
                "run cannot go on: write teacher_pass: shared."
            )
        self.stop(why)

    def _record(self, teacher: Callable[[], Tensor], first: int) -> None:
        walk = self._walk = _Walk(first)
        answers = {i: partial(walk.record, self._forms[i]) for i in range(first, self.total)}
        assert self._layers is not None
        try:
            with standing_in(self._layers, answers):
                teacher()
        except BaseException:
            self._walk = None  # what it holds is not to be there when a smaller batch is tried
            raise
        walk.forget()

    def _finish(self, teacher: Callable[[], Tensor], walk: _Walk) -> Tensor:
        assert self._layers is not None
        last = self.total - 1
        answers = {i: partial(walk.go_by, self._forms[i], last=i == last) for i in range(self.total)}
        with standing_in(self._layers, answers):
            return teacher()

    @contextmanager
    def _inside(self, walk: _Walk | None, part: _Part, *, turned: bool = False) -> Iterator[None]:
        """Inside: the layers' own forward, inside any engine's hooks, has the teacher's in front.

        `turned`: the first layer gets other states than the student's.
        """
        before = [(layer, vars(layer).get("forward")) for layer in self._own]

        def call(index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if walk is not None and index >= walk.first:
                with part("teacher"), self._switches[index].off():
                    walk.step(index, own)
            if turned and index == 0:
                args, kwargs = _turned(args, kwargs)
            return own(*args, **kwargs)

        try:
            for index, layer in enumerate(self._own):
                vars(layer)["forward"] = partial(call, index, layer.forward)
            yield
        finally:
            for layer, was in before:
                if was is None:
                    vars(layer).pop("forward", None)
                else:
                    vars(layer)["forward"] = was

    def _prove(self, teacher: Callable[[], Tensor], student: Callable[[], Any]) -> None:
        self._switches = [TeacherSwitch(layer) for layer in self._own]
        devices = sorted({p.device.index or 0 for p in self.model.parameters() if p.device.type == "cuda"})
        try:
            with torch.random.fork_rng(devices):  # this micro-batch draws what it would have drawn
                why = self._tried(teacher, student, devices)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            why = f"the model does not run so ({type(error).__name__}: {error})"
        finally:
            self._walk = None
        if any_process(bool(why), self.model.device):  # else the processes of a split model would gather other layers
            self.stop(why or "another process found a difference")
        self.proven = not self.why
        self._marks = self._calls_now()

    def _tried(self, teacher: Callable[[], Tensor], student: Callable[[], Any], devices: list[int]) -> str:
        """Runs the teacher whole, a student turned about, and both at once; returns what was other, or ""."""
        if any("context_fn" in _checkpointing_keywords(layer) for layer in self._own):
            return "selective checkpointing (context_fn) counts a layer's operators"
        before = _random_states(devices)
        with self._seen_whole() as forms:
            expected = teacher()
        if not _equal(before, _random_states(devices)):
            return "the teacher draws random numbers"
        if [index for index, _ in forms] != list(range(self.total)):
            return "the layers are not run once each, in their order"
        self._forms = [form for _, form in forms]
        if _MORE in self._forms:
            return "the layers give back more than their states"
        alone = self._turned_student(student, None, devices)
        self._record(teacher, 0)
        walk = self._walk
        assert walk is not None
        if walk.broken or walk.recorded != self.total:
            return walk.broken or "the teacher's pass left a layer out"
        beside = self._turned_student(student, walk, devices)
        if walk.broken or walk.following != self.total:
            return walk.broken or "the student's pass left a layer out"
        if not _same(self._finish(teacher, walk), expected):
            return "the teacher's states are others inside the student's pass"
        return "" if _equal(alone, beside) else "the student's states are others with the teacher's inside"

    def _turned_student(self, student: Callable[[], Any], walk: _Walk | None, devices: list[int]) -> list[Tensor]:
        """Every tensor of a student's pass, without gradient, whose first layer gets states turned about."""
        checkpointing = [layer for layer in self._own if layer.gradient_checkpointing]
        try:
            for layer in checkpointing:  # nothing is to be computed again, and one kind warns that nothing can
                vars(layer)["gradient_checkpointing"] = False
            with torch.no_grad(), torch.random.fork_rng(devices), self._inside(walk, _uncounted, turned=True):
                return list(_tensors(student()))
        finally:
            for layer in checkpointing:
                vars(layer)["gradient_checkpointing"] = True

    @contextmanager
    def _seen_whole(self) -> Iterator[list[tuple[int, Any]]]:
        """Inside: which layers run, in their order, and what each gives without its states."""
        seen: list[tuple[int, Any]] = []

        def note(index: int, layer: nn.Module, args: Any, output: Any) -> None:
            seen.append((index, with_states(output, None) if has_states_alone(output) else _MORE))

        handles = [layer.register_forward_hook(partial(note, index)) for index, layer in enumerate(self._own)]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _calls_now(self) -> list[Any]:
        return [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in self._own]

    def _find(self) -> str:
        """Returns why the teacher needs a pass of its own, as far as the model shows it, or ""."""
        if self._layers is None:
            return "the model's layers were not found"
        if skips_layers(self.model):
            return "layers that images alone go through are left out of a batch of text"
        if beside_the_language_model(self.model):
            return "a multimodal model's towers would run once more"
        if any(vars(module).get("layerdrop") for module in self.model.modules()):
            return "layerdrop leaves layers out of the student's pass"
        return ""


class _Walk:
    """One teacher's pass on its way through the layers.

    Attributes:
        first: The layer that it begins at; it has run those below.
        following: The layer that is to run next.
        broken: What stands against it, in words.
    """

    def __init__(self, first: int) -> None:
        self.first = self.following = first
        self.broken = ""
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._states: Any = None
        self._given: tuple[Tensor, int] | None = (
            None  # what the layer before gave, and how often it had been written to
        )

    @property
    def recorded(self) -> int:
        """Returns the layer after the last one that was recorded."""
        return self.first + len(self._calls)

    def record(self, form: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keeps what a layer is given beside its states, and lets these by."""
        states = given_states(args, kwargs)
        if self._given is None:
            self._states = states.clone()  # the model may write to its own after the last layer
        elif not _is_unchanged(states, *self._given):
            self.broken = "the model changes its states between two layers"
        self._given = (states, _times_written(states))
        self._calls.append(_replaced(args, kwargs, None))
        return with_states(form, states)

    def forget(self) -> None:
        """Lets go of the states that went by, which nobody needs to compare any more."""
        self._given = None

    def step(self, index: int, own: Callable[..., Any]) -> None:
        """Runs a layer on the teacher's states, by what was recorded for it."""
        if self.broken or index != self.following:
            self.broken = self.broken or "the student's pass runs its layers in another order"
            return
        args, kwargs = _replaced(*self._calls[index - self.first], self._states)
        # a context of its own: what transformers collects of the student's layers (router logits) is not to have these
        self._states = states_of(contextvars.Context().run(own, *args, **kwargs))
        self._calls[index - self.first] = ((), {})
        self.following += 1

    def go_by(self, form: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, last: bool) -> Any:
        """What a layer gives where it does not run: what it is given, the last one what the teacher has come to."""
        if not last:
            return with_states(form, given_states(args, kwargs))
        states, self._states = self._states, None  # held by the model alone
        return with_states(form, states)


def _is_unchanged(states: Tensor, given: Tensor, version: int) -> bool:
    """Whether these are the states that a layer gave, perhaps a view of all of them, and nobody wrote to them since."""
    if states is not given:
        one, other = ((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (states, given))
        if one != other:
            return False
    return _times_written(states) == version


def _times_written(states: Tensor) -> int:
    return 0 if states.is_inference() else states._version  # torch.inference_mode counts none


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], states: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def _turned(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with other states: at the first step teacher's and student's are one, and hide a leak."""
    return _replaced(args, kwargs, -given_states(args, kwargs).roll(1, dims=-2))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(_same, one, other))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; what is none counts as the same: states turned about may overflow."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def _random_states(devices: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in devices)]


def _checkpointing_keywords(layer: nn.Module) -> dict[str, Any]:
    return getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
