"""A run that dies for memory says what took it, and what would save some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from peft import LoraConfig

from ..distributed import process_rank, world_size
from ..memory.estimate import Held, Workload, gib
from ..memory.held import held_by
from ..memory.remedies import Case, advice
from ..memory.twin import Twin, hollow
from .host import optimizer_name
from .run_state import RunState


class _Host(Protocol):
    ba_lora_run: RunState | None
    args: Any


@contextmanager
def advised(host: _Host) -> Iterator[None]:
    """Adds advice to an error of the device's memory that leaves the block.

    The advice is counted on shapes, on the CPU: nothing is asked of the device, whose memory is full, nor of other
    ranks, which may go on.

    Raises:
        torch.OutOfMemoryError: of the same type, its message followed by the counts and what would save some.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if host.ba_lora_run is None:
            raise
        raise type(error)(f"{error}\n{_advice(host.ba_lora_run, host.args)}") from error


def _advice(run: RunState, args: Any) -> str:
    rank = f" on rank {process_rank()}" if world_size() > 1 else ""
    held = held_by(run.wrapped, optimizer_name(args))
    if run.batch_shape is None:
        return f"BA-LoRA{rank}: {_held_in_words(held)}; no micro-batch was begun."
    try:
        case = _case(run, args, held)
        now = case.estimate()
    except Exception as error:  # models of any kind come here: what is known is said, and the first error stays
        first = str(error).strip().partition("\n")[0]
        return f"BA-LoRA{rank}: {_held_in_words(held)}; the passes could not be counted ({first})."
    rows, length = run.batch_shape
    return "\n".join([f"BA-LoRA{rank}: a step of {rows} x {length} tokens takes {now.in_words()}.", *advice(case, now)])


def _case(run: RunState, args: Any, held: Held) -> Case:
    """The run as shapes, its last micro-batch as the workload."""
    assert run.batch_shape is not None
    adapter = run.adapter if isinstance(run.adapter, LoraConfig) else None
    twin = Twin(hollow(type(run.model), run.model.config), adapter)
    twin.like(run.wrapped)
    work = Workload(
        *run.batch_shape,
        terms=run.config,
        cached=run.cache is not None,
        checkpointing=run.model.is_gradient_checkpointing,
        accumulates=args.gradient_accumulation_steps > 1,
        optimizer=optimizer_name(args),
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        device_type=args.device.type,
    )
    kinds = {type(module).__name__ for module in run.model.modules()}
    bits = 4 if "Linear4bit" in kinds else 8 if "Linear8bitLt" in kinds else None
    return Case(twin, work, held, bits, adapts=adapter is not None)


def _held_in_words(held: Held) -> str:
    return (
        f"weights {gib(held.weights)} GiB, frozen factors {gib(held.frozen_factors)}, what trains {gib(held.trained)}, "
        f"optimizer {gib(held.optimizer)} are held all along"
    )
