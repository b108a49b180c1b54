"""What a process of a job needs to know of the others, without a Trainer: ranks, agreement, whole tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """FSDP or ZeRO-3: a process holds a part of each weight, and reading one is collective."""
    if any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters()):
        return True
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def is_first_process() -> bool:
    """Rank 0, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _job() -> tuple[int, int]:
    """(number of ranks, this rank)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def _raise_everywhere(error: str | None, world: int) -> None:
    errors: list[Any] = [error] * world
    if world > 1:  # one rank alone would leave the others waiting
        dist.all_gather_object(errors, error)
    first = next((text for text in errors if text is not None), None)
    if first is not None:
        raise ValueError(first)


def _collective_device(device: torch.device) -> torch.device:
    """`device`, or this rank's accelerator where the process group (plain NCCL) cannot carry tensors of `device`."""
    accelerator = torch.accelerator.current_accelerator()
    if f"{device.type}:" in dist.get_backend_config() or accelerator is None:
        return device
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


@torch.compiler.disable
def anywhere(flag: bool, device: torch.device) -> bool:
    """True on every process if `flag` is on one of them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return flag
    total = torch.tensor(int(flag), device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return bool(total.item())


@torch.compiler.disable
def everywhere(count: int, device: torch.device) -> int:
    """The sum over all processes."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total.item())


def ranks_here() -> list[int]:
    """The ranks of this node, whose random states a Trainer writes beside the adapter; none for a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return []
    count = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return list(range(dist.get_rank(), dist.get_rank() + count))


@contextmanager
def _whole(tensor: Tensor) -> Iterator[Tensor]:
    """A parameter that is sharded over processes, gathered."""
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            yield tensor.data
    elif hasattr(tensor, "full_tensor"):
        yield tensor.full_tensor()
    else:
        yield tensor
