"""What a run has cost, from its meter and its model, written beside the adapter and printed."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import torch

from ..memory.held import held_by
from .cost import format_report, write_report
from .host import optimizer_name
from .run_state import RunState


def publish(run: RunState, args: Any) -> None:
    """Writes what a run has cost into its output directory, and prints it where progress is shown.

    Nothing where no step was measured. `args`: the trainer's arguments.
    """
    meter = run.meter
    if meter is None or not meter.steps:
        return
    report = meter.report(
        task=run.config.task,
        compiled="" if run.compiled is None else run.compiled.in_use(),
        teacher_interval=run.config.teacher_interval,
        held_bytes=dataclasses.asdict(held_by(run.wrapped, optimizer_name(args))),
        device=torch.cuda.get_device_name(args.device) if meter.cuda else platform.machine() or "cpu",
        torch=torch.__version__,
        run=settings_in_words(run, args),
    )
    write_report(report, args.output_dir)
    if not args.disable_tqdm:
        print(format_report(report))


def settings_in_words(run: RunState, args: Any) -> dict[str, Any]:
    """Returns what a run was, JSON-ready, for whoever compares runs: what of its arguments moves its result."""
    adapter = run.adapter
    start = getattr(adapter, "init_lora_weights", None)
    return {
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "max_grad_norm": args.max_grad_norm,
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optim": optimizer_name(args),
        "weight_decay": args.weight_decay,
        "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "adapter": None
        if adapter is None
        else {"kind": str(adapter.peft_type.value).lower(), "start": start, "r": getattr(adapter, "r", None)},
        "terms": run.config.to_dict(),
    }
