"""What a process of a job needs to know of the others, without a Trainer: ranks, agreement, whole tensors.

Without torch.distributed, or before its process group is made, a process is a job of its own: rank 0 of 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def has_process_group() -> bool:
    """Returns whether a process group is running."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Returns the number of processes of the job."""
    return dist.get_world_size() if has_process_group() else 1


def process_rank() -> int:
    """Returns the rank of this process in the job."""
    return dist.get_rank() if has_process_group() else 0


def ranks_here() -> list[int]:
    """Returns the ranks of this node, whose random states a Trainer writes beside the adapter; none of a single one.

    The node's first process, which saves, is the one to ask.
    """
    if world_size() == 1:
        return []
    count = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return list(range(process_rank(), process_rank() + count))


def gather_objects(value: T) -> list[T]:
    """Returns what every process calls this with, by rank. All of them must call it; the values are pickled."""
    found = [value] * world_size()
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def raise_on_every_process(error: str | None) -> None:
    """Raises the first error of any process on all of them: one alone would leave the others waiting.

    Raises:
        ValueError: with the message of the lowest rank that has one.
    """
    first = next((text for text in gather_objects(error) if text is not None), None)
    if first is not None:
        raise ValueError(first)


@torch.compiler.disable
def sum_over_processes(count: int, device: torch.device) -> int:
    """Returns the sum of `count` over all processes, which must all call this; it travels as a tensor on `device`."""
    if world_size() == 1:
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total.item())


@torch.compiler.disable
def any_process(flag: bool, device: torch.device) -> bool:
    """Returns whether `flag` is set on any process; all of them must call this, as [`sum_over_processes`]."""
    return sum_over_processes(int(flag), device) > 0


def collective_device(device: torch.device) -> torch.device:
    """Returns `device`, or this process's accelerator where the process group (plain NCCL) cannot carry its tensors."""
    # asked first: builds of torch for GPUs raise at the next question on a machine without one, or name its kind
    if f"{device.type}:" in dist.get_backend_config() or not torch.accelerator.is_available():
        return device
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def is_sharded(model: nn.Module) -> bool:
    """Returns whether FSDP or ZeRO-3 has split the model, so that reading a weight takes all processes."""
    if any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters()):
        return True
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def is_loaded(parameters: Iterable[Tensor]) -> bool:
    """Returns whether weights are those of a model: a host that saves CPU memory reads them on one rank alone.

    On the others they are on the meta device, or, as transformers leaves them for FSDP's cpu_ram_efficient_loading, all
    zero. Weights in parts, and packed ones, count as loaded.
    """
    given = list(parameters)
    if any(parameter.device.type == "meta" for parameter in given):
        return False
    return not given or not all(map(_is_zero, given))


def check_loaded(parameters: Iterable[Tensor], otherwise: str) -> None:
    """Refuses weights that are not loaded on every process, which all must call this; `otherwise`: the message.

    Raises:
        ValueError: on all of them.
    """
    raise_on_every_process(None if is_loaded(parameters) else otherwise)


def _is_zero(parameter: Tensor) -> bool:
    whole = not hasattr(parameter, "ds_id") and not hasattr(parameter, "full_tensor")
    return whole and parameter.dtype in _FLOATS and not bool(parameter.detach().any())


@contextmanager
def whole_for_writing(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside: parameters that ZeRO-3 has split are whole, and what all processes write to them stays."""
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(split, modifier_rank=0):
        yield


@contextmanager
def gathered(tensor: Tensor) -> Iterator[Tensor]:
    """Gives a parameter whole, gathered from all processes if it is sharded; all of them must enter the block."""
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            yield tensor.data
    elif hasattr(tensor, "full_tensor"):
        yield tensor.full_tensor()
    else:
        yield tensor
