"""The layers below the first adapted one: teacher and student are one there, so they are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distributed import any_process
from .decoder_layers import (
    given_states,
    has_states_alone,
    layers_of,
    skips_layers,
    standing_in,
    states_of,
    with_states,
)


class SharedLayers:
    """Lets the student begin where the adapter begins, with what the teacher's pass found there.

    The first training pass proves it: the teacher's states without the layers below are bit for bit those with them,
    and the student's whole pass brings the first adapted layer what the teacher's brought. What differs (a model's own
    dropout, NEFTune's noise, a layer with a state of its own) ends the sharing, and `why` says it.

    Args:
        model: The model inside any adapter, adapted; read once, before an engine wraps its layers.
        why: A reason not to share that is known already.

    Attributes:
        first: The first adapted layer; those before it are shared.
        total: All layers.
        why: Why nothing is shared, in words; "" where it is, or may be.
        proven: Whether the first pass has shown it.
        passes: How many passes, of the student or of a teacher of some rows, left the shared layers out.
    """

    def __init__(self, model: PreTrainedModel, why: str = "") -> None:
        self.model = model
        self.proven = False
        self.passes = 0
        self._layers = layers_of(model)
        self.first, self.total = 0, len(self._layers or ())
        self.why = why or self._find()
        self._kept: _Kept | None = None
        self._repeats = False  # the teacher's states without the layers below were the same
        self._proof: list[Any] = []  # what the shared layers were like then

    def serves(self, model: nn.Module, *, training: bool) -> bool:
        """Returns whether a pass of `model` may use this; evaluation proves nothing, so it comes after training."""
        return model is self.model and not self.why and (training or self.proven)

    def stop(self, why: str) -> None:
        """Ends the sharing; every process of a job has to say it at the same pass."""
        self.why, self.proven = self.why or why, False

    def renew(self) -> None:
        """Asks for a new proof: a training begins, and what was shown in an earlier one may hold no longer."""
        self.proven = False

    def teacher(self, run: Callable[[], Tensor]) -> Tensor:
        """Returns the teacher's states, `run()`, and keeps what enters the first adapted layer."""
        kept = self._kept = _Kept()
        handle = self._last().register_forward_hook(kept.take, with_kwargs=True)
        try:
            states = run()
        finally:
            handle.remove()
        if not self.proven:
            self._repeats = self._is_repeated(run, states)
        return states

    @contextmanager
    def student(self) -> Iterator[None]:
        """Inside: the student's pass goes without the shared layers; the first time whole, and compared."""
        if self.proven and self._marks() != self._proof:
            self.stop("a hook, dropout or trained weight has come to the layers below the adapter")
        elif self.proven and not (self._kept and self._kept.whole):
            self.stop(_not_whole(self._kept))
        try:
            if self.why:
                yield
            elif self.proven:
                with self._left_out():
                    yield
                self.passes += 1
            else:
                seen = _Seen(self._kept, self.model.device)
                handle = self._last().register_forward_hook(seen.compare)
                try:
                    yield
                finally:
                    handle.remove()
                self._decide(seen)
        finally:
            self._kept = None

    @contextmanager
    def kept_for_rows(self) -> Iterator[None]:
        """Inside: the student's pass is whole, and what enters the first adapted layer is kept for `teacher_of`."""
        kept = _Kept()
        handle = self._last().register_forward_hook(kept.take, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        self._kept = kept  # not after a pass that fails

    def teacher_of(self, rows: Tensor | None, run: Callable[[], Tensor]) -> Tensor:
        """Returns the teacher's states of some rows, (k,) int64, `run()`: it begins where the student has been.

        `rows`: None for all.
        """
        kept = None if self._kept is None else self._kept.of(rows)
        if self._marks() != self._proof:
            self.stop("a hook, dropout or trained weight has come to the layers below the adapter")
        elif kept is None:
            self.stop("what the layers below the adapter give is not told apart by rows")
        self._kept = kept
        try:
            with nullcontext() if self.why else self._left_out():
                states = run()
        finally:
            self._kept = None
        self.passes += not self.why
        return states

    def _decide(self, seen: _Seen) -> None:
        if self._kept is None or not self._kept.whole:
            self.why = _not_whole(self._kept)
        elif not self._repeats:
            self.why = "the model's states are others without the layers below"
        elif not seen.same:
            self.why = "teacher and student differ below the adapter: dropout or noise of the model's own"
        if any_process(bool(self.why), seen.device):  # else the processes of a split model would gather other layers
            self.why = self.why or "another process found a difference"
        self.proven = not self.why
        self._proof = self._marks()

    def _marks(self) -> list[Any]:
        """What of the shared layers decides whether they still are what the proof saw, as far as it can be asked."""
        assert self._layers is not None
        return [
            (
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                module.p if isinstance(module, nn.modules.dropout._DropoutNd) else None,
                any(parameter.requires_grad for parameter in module._parameters.values() if parameter is not None),
            )
            for layer in list(self._layers)[: self.first]
            for module in layer.modules()
        ]

    def _is_repeated(self, run: Callable[[], Tensor], states: Tensor) -> bool:
        if self._kept is None or not self._kept.whole:
            return False
        try:
            with self._left_out():
                return torch.equal(run(), states)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
            return False  # the model asks something of a layer that is not there

    @contextmanager
    def _left_out(self) -> Iterator[None]:
        """Inside: what was kept stands in the place of the shared layers."""
        assert self._layers is not None and self._kept is not None
        kept, last = self._kept, self.first - 1
        with standing_in(self._layers, {i: kept.give if i == last else kept.pass_by for i in range(self.first)}):
            yield

    def _last(self) -> nn.Module:
        assert self._layers is not None
        return self._layers[self.first - 1]  # asked anew: FSDP1 puts a wrapper in a layer's place

    def _find(self) -> str:
        """Finds the first adapted layer; returns why nothing is shared, or ""."""
        if self._layers is None:
            return "the model's layers were not found"
        if skips_layers(self.model):
            return "layers that images alone go through are left out of a batch of text"
        adapted = [index for index, layer in enumerate(self._layers) if any(map(_differs, layer.modules()))]
        if not adapted:
            return "no layer is adapted"
        self.first = adapted[0]
        if not self.first:
            return "the first layer is adapted"
        beside = _beside(self.model, self._layers)
        return f"{beside} is adapted or trained, beside the layers" if beside else ""


class _Kept:
    """What the last shared layer gave in the teacher's pass.

    `side`: the mappings that layers fill for later ones (keys and values that Gemma's upper layers share), by keyword.
    """

    def __init__(self) -> None:
        self.output: Any = None
        self.side: dict[str, dict[Any, Any]] = {}

    def take(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self.output = output
        self.side = {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}

    def of(self, rows: Tensor | None) -> _Kept | None:
        """What a pass over some of the rows would have kept; None where it is not told apart by rows."""
        kept, states = _Kept(), states_of(self.output)
        if not self.whole or states.ndim != 3:
            return None
        if rows is None:
            rows = torch.arange(len(states))
        for name, entries in self.side.items():
            parts = {key: _tensors(value) for key, value in entries.items()}
            if not all(part and all(len(x) == len(states) for x in part) for part in parts.values()):
                return None
            kept.side[name] = {key: tuple(x[rows.to(x.device)] for x in part) for key, part in parts.items()}
        kept.output = with_states(self.output, states.detach()[rows.to(states.device)])
        return kept

    @property
    def whole(self) -> bool:
        """Whether it is one tensor of states, alone or with nothing beside it."""
        return has_states_alone(self.output)

    def pass_by(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the other shared layers give in the last one's name: what they are given."""
        return with_states(self.output, given_states(args, kwargs))

    def give(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the last shared layer gives where it does not run."""
        for name, entries in self.side.items():
            kwargs[name].update(entries)
        states = states_of(self.output)
        if torch.is_grad_enabled() and given_states(args, kwargs).requires_grad:
            states = states.detach().requires_grad_()  # as embeddings do, for reentrant checkpointing
        return with_states(self.output, states)


class _Seen:
    """Compares what the last shared layer gives in the student's pass with what was kept."""

    def __init__(self, kept: _Kept | None, device: torch.device) -> None:
        self._kept = kept
        self.same = False
        self.device = device

    def compare(self, layer: nn.Module, args: Any, output: Any) -> None:
        states, kept = states_of(output), states_of(None if self._kept is None else self._kept.output)
        if isinstance(states, Tensor) and isinstance(kept, Tensor) and states.shape == kept.shape:
            self.same = torch.equal(states.detach(), kept)


def _not_whole(kept: _Kept | None) -> str:
    if kept is None or kept.output is None:
        return "the last layer below the adapter was not run"
    return "the layers give back more than their states"


def _tensors(entry: Any) -> tuple[Tensor, ...]:
    """An entry of a layer's mapping, keys and values say; () where it is none of tensors alone."""
    alone = isinstance(entry, tuple) and all(isinstance(each, Tensor) for each in entry)
    return entry if alone else ()


def _differs(module: nn.Module) -> bool:
    """Whether a module may be another one for the student than for the teacher, what is in it left out."""
    if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return True
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _beside(model: PreTrainedModel, layers: nn.ModuleList) -> str:
    """The name of a module outside layers and head that differs between teacher and student; "" where none does."""
    after = {id(module) for head in _heads(model) for module in head.modules()}
    inside = {id(module) for module in layers.modules()}
    for name, module in model.named_modules():
        if id(module) not in after and id(module) not in inside and _differs(module):
            return name
    return ""


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    """What reads the final hidden states: the LM head, or what a classifier has beside its backbone."""
    head = model.get_output_embeddings()
    if head is not None:
        return [head]
    return [] if model.base_model is model else [child for child in model.children() if child is not model.base_model]
