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
    )
    write_report(report, args.output_dir)
    if not args.disable_tqdm:
        print(format_report(report))
