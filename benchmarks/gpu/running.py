"""Sections one after the other, each in a process of its own, so that what breaks one is a line in the table.

A fault of a kernel leaves its process without a device, memory that ran out leaves pieces, and what hangs has to be
ended from outside. What a section has found until then is kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .report import Section, Table, facts, write

MARGIN = 5.0  # seconds that are left for ending a section and writing


class Plan(NamedTuple):
    """A section: its name, its title, how many seconds it may take, and `module:function`, which yields its tables."""

    name: str
    title: str
    seconds: float
    target: str


def run(plans: Sequence[Plan], device: torch.device, folder: Path, limit: float) -> list[Section]:
    """Runs all of them within `limit` seconds; writes the page after each."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    known, done = facts(device), []
    for plan in plans:
        left = limit - (time.monotonic() - began) - MARGIN
        print(f"{plan.title}: at most {min(plan.seconds, max(left, 0)):.0f} s", flush=True)
        section = one(plan, device, folder, min(plan.seconds, left))
        done.append(section)
        print(f"\n{section.markdown()}\n\n({section.seconds:.0f} s)\n", flush=True)
        write(folder, known, done)
    return done


def one(plan: Plan, device: torch.device, folder: Path, seconds: float) -> Section:
    """Runs a section for so many seconds."""
    if seconds < 1:
        return Section(plan.name, plan.title, failure="no time was left")
    found, log = folder / f"{plan.name}.jsonl", folder / f"{plan.name}.log"
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.section", plan.target, "--device", str(device)]
    began = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, "--output", str(found)], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            failure = _failure(process.wait(timeout=seconds), log)
        except subprocess.TimeoutExpired:
            failure = f"stopped after {seconds:.0f} s"
        finally:  # compilers and pytest's own processes too
            _end(process)
    section = Section(plan.name, plan.title, time.monotonic() - began, failure)
    for entry in _entries(found):
        if "error" in entry:
            section.failure = entry["error"]
        else:
            section.tables.append(Table(**{**entry, "header": tuple(entry["header"])}))
    return section


def _failure(code: int, log: Path) -> str:
    if code == 0:
        return ""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}, as where memory runs out"
    last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"ended with code {code}: {last[-1][:160] if last else ''}"


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _entries(found: Path) -> Iterator[dict[str, Any]]:
    """Whole lines alone: a process may have been ended within one."""
    if not found.exists():
        return
    for line in found.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
