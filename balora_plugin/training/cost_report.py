"""What a run has cost, from its meter and its model, written beside the adapter and printed."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

import torch

from ..memory.held import held_by
from .cost import format_report, write_report
from .host import HostTrainer, optimizer_name
from .log_keys import PREFIX
from .run_state import RunState
from .sharing import by_layer_report, sharing_report

_COUNTED = {"nlg": "tokens", "nlu": "samples"}


def cost_at_end(host: HostTrainer, run: RunState, logs: Mapping[str, float]) -> dict[str, float]:
    """Returns what the run has cost, by log key, for the host's last log; for another one nothing.

    Asked on every process: counted tokens are added up over them, and times are each process's own.
    """
    meter, counted = run.meter, run.metrics.counted
    if "train_runtime" not in logs or meter is None or not meter.steps or counted is None:
        return {}
    total = float(host.accelerator.reduce(counted, "sum"))
    seconds = meter.seconds["step"] / meter.steps
    meter.per_second = total / meter.finished / seconds
    found = {"seconds_per_step": seconds, f"{_COUNTED[run.config.task]}_per_second": meter.per_second}
    overhead = overhead_of(run)
    if overhead is not None:
        found["overhead"] = overhead
    if meter.peaks:
        found["peak_gib"] = max(meter.peaks.values())
    return {f"{PREFIX}{name}": value for name, value in found.items()}


def overhead_of(run: RunState) -> float | None:
    """Returns what the terms add to a step without them; None where that is unmeasured."""
    compiled = "" if run.compiled is None else run.compiled.in_use()
    if run.meter is None or compiled == "whole":
        return None
    return run.meter.overhead(task_in_terms=run.config.task != "nlu")


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
        shared_layers=sharing_report(run),
        teacher_by_layer=by_layer_report(run),
        overhead=overhead_of(run),
        per_second=meter.per_second,
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
