"""What a training run cost: seconds an optimizer step and peak memory, by part; a table and a JSON file at the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..checkpoint.names import COST_FILE

PARTS = ("teacher", "student", "token_terms", "spectrum", "rest")
WITHIN = ("shares", "task_alone")  # of the student's: measuring shares, and in it the task's own loss once more
LABELS = {
    "teacher": "teacher forward",
    "student": "student forward and backward",
    "token_terms": "token terms",
    "spectrum": "spectrum",
    "rest": "rest (optimizer, data, logging)",
    "step": "optimizer step",
}
MEMORY_STEP = 1  # the optimizer step whose memory is measured: the first after everything exists
WARM_UP = 1  # first steps that are not counted: allocation, compilation


class CostMeter:
    """Adds up seconds by part. On CUDA by events, which are read at the end of a step: no part waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.seconds = dict.fromkeys((*PARTS, "step"), 0.0)
        self.within = dict.fromkeys(WITHIN, 0.0)
        self.passes = dict.fromkeys(("micro", *WITHIN), 0)  # how often each ran
        self.finished = 0  # steps, those that are not counted too
        self.per_second: float | None = None  # counted tokens, or a classifier's samples; known at the end
        self.peaks: dict[str, float] = {}  # GiB
        self.steps = 0
        self._events: list[tuple[str, Any, Any]] = []
        self._now: dict[str, float] = {}
        self._times: dict[str, int] = {}
        self._began: float | None = None  # None: the clock stands
        self._carried = 0.0  # of this step, from before the clock stood
        self._spoilt = False
        self._measures_memory = False
        self._open: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what runs inside as `name`; "micro" is a whole micro-batch, of which the student is what is left."""
        self._enter(name)
        start = self._mark()
        try:
            yield
        finally:
            end = self._mark()
            self._times[name] = self._times.get(name, 0) + 1
            if self.cuda:
                self._events.append((name, start, end))
            else:
                self._now[name] = self._now.get(name, 0.0) + end - start
            self._leave()

    def begin(self) -> None:
        """Before the first micro-batch of a step. It counts from where the last one ended, unless the clock stands."""
        if self._began is None:
            self._began = time.perf_counter()

    def step(self) -> None:
        """After every optimizer step."""
        now = time.perf_counter()
        if self._began is None:
            self._began = now
            return
        total, self._began, self._carried = self._carried + now - self._began, now, 0.0
        if self.cuda and self._events:
            self._events[-1][2].synchronize()
            for name, start, end in self._events:
                self._now[name] = self._now.get(name, 0.0) + start.elapsed_time(end) / 1e3
        self._events = []
        found, self._now = self._now, {}
        times, self._times = self._times, {}
        spoilt, self._spoilt = self._spoilt, False
        self.finished += 1
        self._measures_memory = self.finished == MEMORY_STEP
        if spoilt or self.finished <= WARM_UP:
            return
        named = {name: found.get(name, 0.0) for name in ("teacher", "token_terms", "spectrum")}
        student = max(found.get("micro", 0.0) - sum(named.values()), 0.0)
        for name, value in {**named, "student": student, "step": total}.items():
            self.seconds[name] += value
        self.seconds["rest"] += max(total - found.get("micro", 0.0), 0.0)
        for name in WITHIN:
            self.within[name] += found.get(name, 0.0)
        for name in self.passes:
            self.passes[name] += times.get(name, 0)
        self.steps += 1

    def pause(self) -> None:
        """Stops the clock between two steps: what follows, an evaluation or a checkpoint, is no step's."""
        if self._began is None:
            return
        if self.cuda:  # the last step's kernels still run
            torch.cuda.synchronize(self.device)
        self._carried += time.perf_counter() - self._began
        self._began = None

    def resume(self) -> None:
        """After an evaluation or a checkpoint; one that nobody announced, inside a step, makes that step not count."""
        self._began = time.perf_counter()
        self._spoilt = bool(self._open or self._now or self._events)

    def overhead(self, *, task_in_terms: bool) -> float | None:
        """What the terms add to a step, as a part of the same step without them; None where that was not measured.

        Teacher, token terms but for the task's own loss, spectrum, and the measuring of shares. `task_in_terms`: the
        task's loss is taken with the token terms (language models); what it costs alone is measured where shares are.
        """
        task = 0.0
        terms = self.seconds["teacher"] + self.seconds["spectrum"]
        if task_in_terms and (terms or self.within["shares"]):
            if not self.passes["task_alone"]:
                return None
            task = self.within["task_alone"] / self.passes["task_alone"] * self.passes["micro"]
        elif task_in_terms:  # no term runs but perhaps diversity's, which is within the task's own pass
            task = self.seconds["token_terms"]
        added = terms + max(self.seconds["token_terms"] - task, 0.0) + self.within["shares"]
        alone = self.seconds["step"] - added
        return added / alone if alone > 0 else None

    def report(self, **facts: Any) -> dict[str, Any]:
        """Seconds an optimizer step and GiB by part; `facts` are added as they are."""
        steps = max(self.steps, 1)
        peaks: dict[str, float] = {}
        for name, value in self.peaks.items():
            part = "student" if name in ("micro", *WITHIN) else name
            peaks[part] = max(peaks.get(part, 0.0), round(value, 4))
        return {
            "steps_measured": self.steps,
            "seconds_per_step": {name: self.seconds[name] / steps for name in (*PARTS, "step")},
            "peak_gib": peaks,
            "memory": "device memory" if self.cuda else "resident memory of the process",
            **facts,
        }

    def _enter(self, name: str) -> None:
        if self._measures_memory and self._open:
            self._take_peak()
        self._open.append(name)
        if self._measures_memory:
            self._reset_peak()

    def _leave(self) -> None:
        if self._measures_memory:
            self._take_peak()
            self._reset_peak()
        self._open.pop()

    def _take_peak(self) -> None:
        name = self._open[-1]
        self.peaks[name] = max(self.peaks.get(name, 0.0), self._peak())

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # Linux: the high-water mark starts anew
                Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**20
        return 0.0


class CostCallback(TrainerCallback):
    """Tells a trainer's meter where optimizer steps end, and what between them is none of theirs."""

    def __init__(self, meter: CostMeter) -> None:
        self.meter = meter

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.step()
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_evaluate or control.should_save:
            self.meter.pause()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self.meter.resume()

    def on_save(self, *_: Any, **__: Any) -> None:
        self.meter.resume()


def format_report(report: dict[str, Any]) -> str:
    """The report as an aligned table."""
    seconds, peaks = report["seconds_per_step"], report["peak_gib"]
    lines = [f"BA-LoRA: cost of an optimizer step (mean of {report['steps_measured']})"]
    whole = seconds["step"] or 1.0
    for name in (*PARTS, "step"):
        if name != "step" and not seconds[name] and name in ("teacher", "spectrum", "token_terms"):
            continue
        peak = f"{peaks[name]:8.2f} GiB" if peaks.get(name) else ""
        label = "sample terms" if name == "token_terms" and report.get("task") == "nlu" else LABELS[name]
        lines.append(f"  {label:34s}{seconds[name]:9.4f} s {100 * seconds[name] / whole:5.1f} %{peak}")
    if report.get("overhead") is not None:
        lines.append(f"  {100 * report['overhead']:+.1f} % over no terms, as the parts were measured in this run")
    if speed := report.get("per_second"):
        what = "samples" if report.get("task") == "nlu" else "counted tokens"
        lines.append(f"  {speed:,.0f} {what} a second")
    if shared := report.get("shared_layers"):
        lines.append(f"  {_shared_in_words(shared)}")
    if by_layer := report.get("teacher_by_layer"):
        lines.append(f"  {_by_layer_in_words(by_layer)}")
    if held := report.get("held_bytes"):
        parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in held.items())
        lines.append(f"  held all along, GiB: {parts}")
    if report.get("compiled") == "whole":
        lines.append("  (compiled: the terms are part of the student's graph, but where shares are measured)")
    elif report.get("compiled"):
        lines.append("  (compiled by layer)")
    return "\n".join(lines)


def _shared_in_words(shared: dict[str, Any]) -> str:
    if not shared["layers"]:
        return f"teacher and student share no layer: {shared['why'] or 'no pass has shown yet that they may'}"
    return (
        f"{shared['layers']} of {shared['of']} layers computed once for teacher and student, {shared['passes']} times"
    )


def _by_layer_in_words(found: dict[str, Any]) -> str:
    if not found["passes"]:
        return f"the teacher ran in passes of its own: {found['why'] or 'no pass has shown yet that it need not'}"
    text = f"the teacher ran inside the student's call of each layer, {found['passes']} times"
    if found["gathered_less_gib"]:
        text += f": {found['gathered_less_gib']:.2f} GiB of weights gathered once less"
    return f"{text}; then no more: {found['why']}" if found["why"] else text


def write_report(report: dict[str, Any], directory: str) -> str:
    """Writes `ba_lora_cost.json` into the output directory, beside the adapter; returns its path."""
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, COST_FILE)
    Path(path).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path
