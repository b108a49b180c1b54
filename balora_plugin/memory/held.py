"""Bytes that a run holds from its first optimizer step to its last, read from parameters: shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..adapter.delta import FROZEN
from .estimate import Held
from .live import bytes_of

# bytes that an optimizer keeps for a parameter of n elements of s bytes: how many copies of it, or bytes an element
_COPIES = {"adam": 2, "lamb": 2, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "muon": 1, "schedule_free": 2}
_BLOCK = 256  # elements that share a float32 scale in bitsandbytes' 8-bit states
_CODES = {"4bit": 4 * 16, "8bit": 4 * 256}  # tables of the values that a code stands for, float32
_SMALL = 4096  # parameters below that keep 32 bits there


def held_by(model: nn.Module, optimizer: str) -> Held:
    """Returns what a model holds, with or without an adapter, on the meta device too.

    Args:
        model: Whose parameters and buffers are counted, each storage once.
        optimizer: Its name, as transformers' `optim` has it.
    """
    frozen = [p for name, p in model.named_parameters() if _is_frozen_factor(name)]
    trained = [p for p in model.parameters() if p.requires_grad]
    theirs = {id(p) for p in (*frozen, *trained)}
    weights = [p for p in model.parameters() if id(p) not in theirs]
    scales = (scale for p in weights for scale in _scales(p))
    return Held(
        weights=bytes_of([*weights, *model.buffers(), *scales]),
        frozen_factors=bytes_of(frozen),
        trained=bytes_of(trained),
        optimizer=sum(state_bytes(p, optimizer) for p in trained),
    )


def state_bytes(parameter: Tensor, optimizer: str) -> int:
    """Returns what an optimizer keeps of one parameter; of a name that is not known as much as Adam does."""
    size, count = bytes_of([parameter]), parameter.numel()
    if "adafactor" in optimizer:
        return 4 * (sum(parameter.shape) if parameter.ndim > 1 else count)
    copies = next((n for name, n in _COPIES.items() if name in optimizer), 2)
    if "8bit" in optimizer and count >= _SMALL:
        return copies * (count + 4 * -(-count // _BLOCK))
    return copies * size


def step_bytes(model: nn.Module, optimizer: str, device_type: str) -> int:
    """Returns what an optimizer's step makes beside gradients and states; nothing where its kernel is fused."""
    if optimizer != "adamw_torch" or device_type == "cpu":
        return 0
    return bytes_of(p for p in model.parameters() if p.requires_grad)  # square roots, for all parameters at once


def quantised_bytes(weight: Tensor, bits: int, *, double: bool = True) -> int:
    """Returns what bitsandbytes stores of a weight (out, in): 4 or 8 bits, and scales, of 4 bits in 8 if `double`."""
    count = weight.numel()
    if bits == 8:
        return count + 4 * weight.shape[0]
    blocks = count // 64
    scales = blocks + 4 * -(-blocks // 256) + _CODES["8bit"] if double else 4 * blocks
    return count // 2 + scales + _CODES["4bit"]


def _is_frozen_factor(name: str) -> bool:
    return any(f".{frozen}." in name for frozen in FROZEN)


def _scales(parameter: Any) -> Iterator[Tensor]:
    """The tensors beside a weight that bitsandbytes has quantised."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (x for x in (state.absmax, state.code) if x is not None)
        state = getattr(state, "state2", None)
    if getattr(parameter, "SCB", None) is not None:
        yield parameter.SCB
