"""Which rows meet the teacher: each once in as many turns as the interval, as evenly over steps as can be."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from types import SimpleNamespace

from balora_plugin.training import teacher_rows
from balora_plugin.training.teacher_rows import TeacherRows, phase_of, rows_met

INTERVALS, ACCUMULATED, ROWS = range(1, 9), range(1, 9), range(1, 10)


def by_micro_batch(turn, rows, interval):
    """The rule that there was: the whole of every n-th."""
    return tuple(range(rows)) if turn % interval == 0 else ()


def test_each_row_meets_it_once_in_as_many_turns_as_the_interval():
    for interval, accumulated, rows, first in itertools.product(INTERVALS, ACCUMULATED, ROWS, (0, 5)):
        turns = range(first, first + interval)
        met = Counter(row for turn in turns for row in rows_met(turn, rows, interval, accumulated))
        assert met == dict.fromkeys(range(rows), 1)


def test_with_one_row_or_a_multiple_of_the_interval_it_is_every_nth_micro_batch():
    for interval, accumulated, rows, turn in itertools.product(INTERVALS, ACCUMULATED, ROWS, range(20)):
        if rows == 1 or accumulated % interval == 0:
            assert rows_met(turn, rows, interval, accumulated) == by_micro_batch(turn, rows, interval)
        assert (0 in rows_met(turn, rows, interval, accumulated)) == (turn % interval == 0)


def spread(met, steps):
    """Variance of how many rows a step meets, and how often the teacher runs in a step."""
    micro = len(met) // steps
    sizes = [sum(map(len, met[step * micro : (step + 1) * micro])) for step in range(steps)]
    return statistics.pvariance(sizes), sum(map(bool, met)) / steps


def test_no_step_meets_more_unevenly_than_by_micro_batch_and_the_teacher_runs_no_oftener_than_that_needs():
    for interval, accumulated, rows in itertools.product(INTERVALS, ACCUMULATED, ROWS):
        turns = range(interval * accumulated)
        new, passes = spread([rows_met(t, rows, interval, accumulated) for t in turns], interval)
        old, before = spread([by_micro_batch(t, rows, interval) for t in turns], interval)
        assert new <= old + 1e-9
        apart = interval // math.gcd(interval, accumulated)
        if rows % apart == 0:
            assert new < 1e-9
        if old < 1e-9:
            assert passes == before


def run_of(rows, interval=4, compiled=None, cache=None):
    return SimpleNamespace(
        config=SimpleNamespace(teacher_interval=interval), rows_apart=rows, compiled=compiled, cache=cache, model=None
    )


def host_of(accumulated=1, epoch=0.0):
    return SimpleNamespace(
        args=SimpleNamespace(gradient_accumulation_steps=accumulated, device="cpu"),
        state=SimpleNamespace(epoch=epoch),
        is_fsdp_enabled=True,
        is_deepspeed_enabled=False,
    )


def test_a_turn_says_what_is_asked_of_the_teacher():
    turns = [TeacherRows(run_of(8), host_of()).of(index) for index in range(5)]
    assert [turn.rows for turn in turns] == [(0, 4), (3, 7), (2, 6), (1, 5), (0, 4)]
    assert all(turn.runs for turn in turns) and [turn.common for turn in turns] == [True, False, False, False, True]
    turns = [TeacherRows(run_of(8, interval=2), host_of(2)).of(index) for index in range(2)]
    assert [(turn.rows, turn.runs) for turn in turns] == [(None, True), (None, False)]
    assert TeacherRows(run_of(8, interval=1), host_of()).of(3) == teacher_rows.WHOLE


def test_a_graph_has_one_number_of_rows():
    for rows, expected in ((8, [2, 2, 2, 2]), (6, [6, 0, 0, 0])):
        turns = [TeacherRows(run_of(rows, compiled=object()), host_of()).of(index) for index in range(4)]
        assert [(rows if t.rows is None else len(t.rows)) * t.runs for t in turns] == expected


def test_where_it_takes_all_processes_it_runs_on_all(monkeypatch):
    """One with fewer rows has none of its own to meet; its first one runs, and nothing of it counts."""
    asked = []
    monkeypatch.setattr(teacher_rows, "world_size", lambda: 2)
    monkeypatch.setattr(teacher_rows, "any_process", lambda flag, device: asked.append(flag) or True)
    turn = TeacherRows(run_of(2), host_of()).of(1)
    assert (turn.rows, turn.runs, turn.late, asked) == ((), True, True, [False])
    single = TeacherRows(run_of(1), host_of()).of(4)  # all of its batch, as late as where it is a part
    assert (single.rows, single.runs, single.late, asked.pop()) == (None, True, True, True)
    assert TeacherRows(run_of(2, interval=2), host_of(2)).of(1).runs is False
    assert len(asked) == 1  # a multiple is the same everywhere


def test_the_phase_is_another_one_in_each_epoch():
    assert phase_of(0, 4) == 0
    assert {phase_of(epoch, 4) for epoch in range(20)} == set(range(4))
