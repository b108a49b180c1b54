"""The cost report: every second is in one part, the parts add up, memory is that of the part."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from balora_plugin.training import cost
from balora_plugin.training.cost import PARTS, CostCallback, CostMeter, format_report, write_report


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    return now


def step(meter, clock, micro_batches=2):
    """An optimizer step of known durations."""
    clock[0] += 0.125  # its first batch, before the host says that a step begins
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
    expected = {"teacher": 4.0, "student": 14.0, "token_terms": 2.0, "spectrum": 0.5, "rest": 1.875, "step": 22.375}
    assert report["seconds_per_step"] == pytest.approx(expected)
    assert sum(expected[name] for name in cost.PARTS) == expected["step"]
    assert report["answer"] == 42


class Control:
    def __init__(self, evaluate=False, save=False):
        self.should_evaluate, self.should_save = evaluate, save


def host(meter, clock, events):
    """Six optimizer steps as the transformers Trainer calls its callbacks; `events`: what is due at which step."""
    callback = CostCallback(meter)

    def out_of_step(due):
        clock[0] += 0.0625  # the log
        if "evaluate" in due:
            clock[0] += 100.0
            callback.on_evaluate(None, None, Control())
        if "save" in due:
            clock[0] += 1000.0
            callback.on_save(None, None, Control())

    for index in range(6):
        due = events.get(index, ())
        clock[0] += 0.125
        callback.on_step_begin(None, None, Control())
        with meter.part("micro"):
            clock[0] += 3.0
            if "in the middle" in due:  # a callback of the user's
                out_of_step(("evaluate",))
        clock[0] += 0.75
        ends = () if "epoch" in due else due
        callback.on_step_end(None, None, Control("evaluate" in ends, "save" in ends))
        if "epoch" in due:
            clock[0] += 0.5
            callback.on_epoch_end(None, None, Control("evaluate" in due, "save" in due))
        out_of_step(due)
    return meter.report()


@pytest.mark.parametrize("when", [(), ("epoch",)])
@pytest.mark.parametrize("due", [("evaluate",), ("save",), ("evaluate", "save")])
def test_evaluation_and_checkpoints_are_in_no_step(due, when, clock):
    """Nor is what such a step logs, but its end of an epoch is the next step's."""
    plain = host(CostMeter(torch.device("cpu")), clock, {})["seconds_per_step"]
    assert plain == {"teacher": 0, "student": 3.0, "token_terms": 0, "spectrum": 0, "rest": 0.9375, "step": 3.9375}
    report = host(CostMeter(torch.device("cpu")), clock, {0: due, 2: (*due, *when), 4: due})
    assert report["steps_measured"] == 5
    lost = 3 * 0.0625 - (0.5 if when else 0.0)
    assert report["seconds_per_step"] == pytest.approx({**plain, "rest": 0.9375 - lost / 5, "step": 3.9375 - lost / 5})


def test_a_step_that_something_unannounced_interrupts_is_not_counted(clock):
    report = host(CostMeter(torch.device("cpu")), clock, {3: ("in the middle",)})
    assert report["steps_measured"] == 4
    assert report["seconds_per_step"]["step"] == pytest.approx(3.9375)


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, labels):
        return {"loss": (self.weight * x - labels).square().mean()}


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_hosts_own_order_of_events(strategy, clock, tmp_path):
    meter = CostMeter(torch.device("cpu"))

    class Slow(Trainer):
        def training_step(self, *args, **kwargs):
            with meter.part("micro"):
                clock[0] += 3.0
                return super().training_step(*args, **kwargs)

        def evaluation_loop(self, *args, **kwargs):
            clock[0] += 100.0
            return super().evaluation_loop(*args, **kwargs)

        def save_model(self, *args, **kwargs):
            clock[0] += 1000.0
            return super().save_model(*args, **kwargs)

    rows = [{"x": float(i), "labels": 1.0} for i in range(4)]
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        eval_strategy=strategy,
        save_strategy=strategy,
        eval_steps=1,
        save_steps=2,
        eval_on_start=True,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Slow(Line(), settings, train_dataset=rows, eval_dataset=rows, callbacks=[CostCallback(meter)])
    trainer.train()
    assert clock[0] > 2000.0
    assert meter.report()["steps_measured"] == 3
    assert meter.report()["seconds_per_step"]["step"] == pytest.approx(6.0)


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
    report = meter.report(compiled="")
    path = write_report(report, str(tmp_path / "out"))
    with open(path, encoding="utf-8") as file:
        assert json.load(file) == json.loads(json.dumps(report))
    lines = format_report(report).splitlines()
    assert [line.split("  ")[1] for line in lines[1:]] == list(cost.LABELS.values())
    assert "100.0 %" in lines[-1]


def test_a_classifiers_terms_are_of_samples():
    report = CostMeter(torch.device("cpu")).report(task="nlu")
    report["seconds_per_step"] = dict.fromkeys((*PARTS, "step"), 1.0)
    assert "sample terms" in format_report(report) and "token terms" not in format_report(report)
    assert "token terms" in format_report({**report, "task": "nlg"})


@pytest.mark.parametrize(
    ("shared", "said"),
    [
        (
            {"layers": 3, "of": 12, "passes": 99, "why": ""},
            "3 of 12 layers computed once for teacher and student, 99 times",
        ),
        (
            {"layers": 0, "of": 12, "passes": 0, "why": "the first layer is adapted"},
            "no layer: the first layer is adapted",
        ),
        ({"layers": 0, "of": 12, "passes": 0, "why": ""}, "no layer: no pass has shown yet that they may"),
    ],
)
def test_what_teacher_and_student_share_is_said(shared, said):
    report = CostMeter(torch.device("cpu")).report(shared_layers=shared)
    assert said in format_report(report)
    assert "share" not in format_report({**report, "shared_layers": None})


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "the teacher ran inside the student's call of each layer, 7 times"),
        ({"gathered_less_gib": 3.5}, "7 times: 3.50 GiB of weights gathered once less"),
        ({"why": "a hook"}, "7 times; then no more: a hook"),
        ({"passes": 0, "why": "a hook"}, "the teacher ran in passes of its own: a hook"),
        ({"passes": 0}, "no pass has shown yet that it need not"),
    ],
)
def test_how_the_teacher_ran_by_layer_is_said(found, said):
    plain = {"layers": 3, "passes": 7, "gathered_less_gib": 0.0, "why": ""}
    report = CostMeter(torch.device("cpu")).report(teacher_by_layer={**plain, **found})
    assert any(line.endswith(said) for line in format_report(report).splitlines())
    assert "the teacher ran" not in format_report({**report, "teacher_by_layer": None})


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
