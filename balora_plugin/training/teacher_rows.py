"""Which rows of which micro-batch meet the teacher, where `teacher_interval` gives it a part of the data."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from ..distributed import any_process, is_sharded, world_size
from .host import HostTrainer
from .run_state import RunState


class Turn(NamedTuple):
    """What a micro-batch has of the teacher.

    Attributes:
        rows: Those that meet it; None: all. None of them where it runs because it does in other processes.
        runs: Whether it runs.
        common: Whether it does in every process whatever their batches are: each one's first row meets it.
        late: Whether every process runs it after the student, as those do whose rows it tells apart, where they share
            layers: one with a single row gathers what the others gather, in their order.
    """

    rows: tuple[int, ...] | None
    runs: bool
    common: bool
    late: bool = False


WHOLE = Turn(None, True, True)


class TeacherRows:
    """Gives each micro-batch of a run its turn. It keeps nothing, so that a resumed run goes on as one that was not."""

    def __init__(self, run: RunState, host: HostTrainer) -> None:
        self._run, self._host = run, host
        self._together: bool | None = None

    def of(self, index: int) -> Turn:
        """Returns the turn of micro-batch `index` of the run, whose batch is the one that the run took last."""
        run, host = self._run, self._host
        interval, accumulated = run.config.teacher_interval, host.args.gradient_accumulation_steps
        if interval == 1:
            return WHOLE
        turn = index + phase_of(int(host.state.epoch or 0), interval)
        common = turn % interval == 0
        apart = rows_apart_in(interval, accumulated)
        rows = run.rows_apart
        if run.compiled is not None and rows % apart:
            rows = 1  # graphs are made for a number of rows: one that changes would take one more each time
        met = rows_met(turn, rows, interval, accumulated)
        agree = apart > 1 and self._must_agree()
        runs = any_process(bool(met), host.args.device) if agree else bool(met)
        return Turn(met if runs and len(met) < rows else None, runs, common, agree and runs)

    def _must_agree(self) -> bool:
        """Whether the teacher's pass takes all processes: a split model is gathered, a cache is asked together."""
        if self._together is None:
            run, host = self._run, self._host
            split = host.is_fsdp_enabled or host.is_deepspeed_enabled or is_sharded(run.model)
            self._together = world_size() > 1 and (split or run.cache is not None)
        return self._together


def rows_met(turn: int, rows: int, interval: int, accumulated: int) -> tuple[int, ...]:
    """Returns which of a micro-batch's rows meet the teacher: over `interval` turns each of them once.

    Where the micro-batches of a step are no multiple of the interval, rows are told apart, so that every step meets as
    many as it can of each; else the teacher runs as seldom. With c = gcd(interval, accumulated) it runs in every c-th
    micro-batch, on every (interval / c)-th row, another one each time: of one row, or with c = interval, in every
    interval-th, on all of it.

    Args:
        turn: Counts micro-batches, the same on every process.
        rows: Of this micro-batch.
        interval: One row in so many is met.
        accumulated: Micro-batches of a step.
    """
    apart = rows_apart_in(interval, accumulated)
    every = interval // apart
    return () if turn % every else tuple(range(-(turn // every) % apart, rows, apart))


def rows_apart_in(interval: int, accumulated: int) -> int:
    """Returns of how many rows of a micro-batch one is met, where any is; 1: all of them, in every interval-th."""
    return interval // math.gcd(interval, accumulated)


def apart_in_words(interval: int, accumulated: int) -> str:
    """Returns that the teacher is given some rows of a micro-batch, and what to write where it is not to be; or ""."""
    if rows_apart_in(interval, accumulated) == 1:
        return ""
    return f"teacher_interval={interval} gives it some rows of a micro-batch: accumulate a multiple of {interval}"


def phase_of(epoch: int, interval: int) -> int:
    """Returns by how many micro-batches an epoch's turns are moved on, the same on every process.

    It is drawn anew for each epoch: data in a fixed order would show the teacher the same part again and again.
    """
    return random.Random(epoch).randrange(interval) if epoch else 0
