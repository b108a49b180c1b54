"""The cost report: every second is in one part, the parts add up, memory is that of the part."""

from __future__ import annotations

import json

import pytest
import torch

from balora_plugin import cost
from balora_plugin.cost import CostMeter, format_report, write_report


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    return now


def step(meter, clock, micro_batches=2):
    """An optimizer step of known durations."""
    meter.begin()
    for _ in range(micro_batches):
        clock[0] += 0.5  # data
        with meter.part("micro"):
            with meter.part("teacher"):
                clock[0] += 2.0
            clock[0] += 3.0
            with meter.part("token_terms"):
                clock[0] += 1.0
            with meter.part("spectrum"):
                clock[0] += 0.25
            clock[0] += 4.0
    clock[0] += 0.75  # the optimizer
    meter.step()


def test_the_parts_add_up(clock):
    meter = CostMeter(torch.device("cpu"))
    for _ in range(4):
        step(meter, clock)
    report = meter.report(answer=42)
    assert report["steps_measured"] == 3  # the first is warm-up
    expected = {"teacher": 4.0, "student": 14.0, "token_terms": 2.0, "spectrum": 0.5, "rest": 1.75, "step": 22.25}
    assert report["seconds_per_step"] == pytest.approx(expected)
    assert sum(expected[name] for name in cost.PARTS) == expected["step"]
    assert report["answer"] == 42


def test_memory_is_that_of_the_part():
    meter = CostMeter(torch.device("cpu"))
    if not meter._peak():
        pytest.skip("the system tells no high-water mark")

    def run():
        with meter.part("micro"):
            with meter.part("teacher"):
                torch.ones(1)
            with meter.part("token_terms"):
                torch.ones(64 << 20)  # 256 MiB
            torch.ones(1)

    meter.begin()
    for _ in range(3):
        run()
        meter.step()
    peaks = meter.report()["peak_gib"]
    assert peaks["token_terms"] - peaks["teacher"] == pytest.approx(0.25, abs=0.05)
    assert peaks["token_terms"] - peaks["student"] == pytest.approx(0.25, abs=0.05)


def test_the_table_and_the_file(clock, tmp_path):
    meter = CostMeter(torch.device("cpu"))
    for _ in range(2):
        step(meter, clock, micro_batches=1)
    report = meter.report(compiled=False)
    path = write_report(report, str(tmp_path / "out"))
    with open(path, encoding="utf-8") as file:
        assert json.load(file) == json.loads(json.dumps(report))
    lines = format_report(report).splitlines()
    assert [line.split("  ")[1] for line in lines[1:]] == list(cost.LABELS.values())
    assert "100.0 %" in lines[-1]


def test_a_part_that_never_ran_has_no_line(clock):
    meter = CostMeter(torch.device("cpu"))
    for _ in range(2):
        meter.begin()
        with meter.part("micro"):
            clock[0] += 1.0
        meter.step()
    text = format_report(meter.report())
    assert "teacher" not in text
    assert "student" in text
