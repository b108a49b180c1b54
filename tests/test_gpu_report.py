"""`make gpu`: a section that fails, hangs or is killed is a line of the report, and the next one runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import LIMIT, PLANS
from benchmarks.gpu.report import Table, printed
from benchmarks.gpu.running import Plan, run

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SECTIONS = """
import os, signal, time
from benchmarks.gpu.report import Table

def good(device):
    yield Table("one", ("name", "value"), [("a", 1.23456), ("b", float("nan"))], "after")
    yield Table("two", ("x",), [(12345.6,)])

def fails(device):
    yield Table("before", ("x",), [(1,)])
    raise MemoryError("out of | memory\\nmore")

def hangs(device):
    yield Table("before", ("x",), [(1,)])
    time.sleep(600)

def killed(device):
    yield Table("before", ("x",), [(1,)])
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def plans(tmp_path, monkeypatch):
    (tmp_path / "fake_sections.py").write_text(SECTIONS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    names = ("fails", "hangs", "killed", "missing", "good")
    return [Plan(name, f"The {name} one", 4 if name == "hangs" else 60, f"fake_sections:{name}") for name in names]


def test_what_breaks_one_section_breaks_no_other(plans, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.running.facts", lambda device: {"device": "none", "torch": "0"})
    done = run(plans, CPU, tmp_path / "out", limit=300)
    failures = {section.name: section.failure for section in done}
    assert failures["fails"] == "MemoryError: out of / memory"
    assert failures["hangs"] == "stopped after 4 s"
    assert failures["killed"].startswith("ended by SIGKILL")
    assert failures["missing"].startswith("AttributeError")
    assert failures["good"] == ""
    assert {section.name: len(section.tables) for section in done} == {
        **dict.fromkeys(("fails", "killed"), 1),
        "hangs": len(done[1].tables),  # a slow machine may not have come to it
        "missing": 0,
        "good": 2,
    }
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert page.startswith("# Measured on none\n") and "| a | 1.235 |\n| b |  |\n\nafter" in page
    assert "| 12346 |" in page and "Not whole: MemoryError: out of / memory." in page
    data = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert data["facts"]["torch"] == "0"
    assert data["sections"][-1]["tables"][0]["rows"] == [["a", 1.23456], ["b", None]]


def test_no_time_left_is_said_and_costs_none(plans, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.running.facts", lambda device: {"device": "none"})
    done = run(plans, CPU, tmp_path / "out", limit=0)
    assert {section.failure for section in done} == {"no time was left"}


def test_an_end_from_outside_ends_the_section_too(plans, tmp_path):
    code = (
        "import sys, pathlib, torch; from benchmarks.gpu import __main__ as m, running\n"
        "m.PLANS = (running.Plan('hangs', 'x', 600, 'fake_sections:hangs'),)\n"
        f"sys.argv = ['x', '--device', 'cpu', '--output', {str(tmp_path / 'out')!r}]\n"
        "m.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    found = tmp_path / "out" / "hangs.jsonl"
    for _ in range(600):
        if found.exists() and found.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    cmdlines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if _readable(path)]
    assert not any(str(found).encode() in line for line in cmdlines)


def _readable(path):
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


def test_all_sections_fit_their_limit():
    assert sum(plan.seconds for plan in PLANS) <= LIMIT <= 600
    from benchmarks.gpu import measured

    assert all(callable(getattr(measured, plan.target.split(":")[1])) for plan in PLANS)


@pytest.mark.parametrize(
    ("cell", "text"), [(0.0001234567, "0.0001235"), (12345.6, "12346"), (3, "3"), ("x", "x"), (float("nan"), "")]
)
def test_numbers_are_printed_without_needless_digits(cell, text):
    assert printed(cell) == text
    assert f"| {text} |" in Table("t", ("a",), [(cell,)]).markdown()


@pytest.mark.long
def test_the_whole_command_runs_on_a_cpu(tmp_path):
    """As `make gpu DEVICE=cpu`; flash attention and what is not installed are notes, no section fails."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--output", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:]
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [section["name"] for section in sections] == [plan.name for plan in PLANS]
    assert all(section["tables"] and not section["failure"] for section in sections)
