"""A model's list of repeated layers: found, stood in for, and what goes in and comes out of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbone import language_model_of


def layers_of(model: PreTrainedModel) -> nn.ModuleList | None:
    """Returns the layers of a language model, its one list of transformers' repeated layers; None: not found."""
    found = [
        module
        for module in language_model_of(model).modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_repeats(layer) for layer in module)
    ]
    return found[0] if len(found) == 1 else None


def skips_layers(model: PreTrainedModel) -> bool:
    """Returns whether a model leaves layers out of a batch of text, those that images alone go through."""
    return bool(getattr(model.config.get_text_config(), "cross_attention_layers", None))


class StandIn(nn.Module):
    """Stands in a layer's place: `answer(args, kwargs)` is what it gives, and nothing of the layer is gathered."""

    def __init__(self, layer: nn.Module, answer: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.__dict__["stands_for"] = layer  # no child: it is not to be found by a walk over modules
        self.__dict__["answer"] = answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"], name)  # what a model asks of its layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["answer"](args, kwargs)


@contextmanager
def standing_in(
    layers: nn.ModuleList, answers: Mapping[int, Callable[[tuple[Any, ...], dict[str, Any]], Any]]
) -> Iterator[None]:
    """Inside: stand-ins are in the places of the layers of these indices; then the layers are back."""
    before = {index: layers[index] for index in answers}  # asked anew: FSDP1 puts a wrapper in a layer's place
    try:
        for index, layer in before.items():
            layers[index] = StandIn(layer, answers[index])
        yield
    finally:
        for index, layer in before.items():
            layers[index] = layer


def given_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the hidden states that a layer is given."""
    return args[0] if args else kwargs["hidden_states"]


def states_of(output: Any) -> Any:
    """Returns the hidden states in what a layer gives: itself, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def has_states_alone(output: Any) -> bool:
    """Returns whether what a layer gives is one tensor of states, alone or with nothing but None beside it."""
    beside = output[1:] if isinstance(output, (tuple, list)) else ()
    return isinstance(states_of(output), Tensor) and all(each is None for each in beside)


def with_states(output: Any, states: Any) -> Any:
    """Returns these states in the form of a layer's `output`."""
    return type(output)([states, *output[1:]]) if isinstance(output, (tuple, list)) else states


def _repeats(layer: nn.Module) -> bool:
    return isinstance(layer, GradientCheckpointingLayer)
