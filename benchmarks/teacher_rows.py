"""`teacher_interval` by rows and by micro-batch, both in one run: `python -m benchmarks.teacher_rows`

The variance of the consistency term's gradient, from passes of the objective itself; what products of fewer rows
round otherwise; and seconds of a step.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from balora_plugin import RegularizerConfig
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.schedules import Lambdas
from balora_plugin.training import teacher_rows
from balora_plugin.training.teacher_rows import rows_met

from .measuring import machine, measure, quiet, table
from .step import Bench
from .teacher import Gradients, UpperHalf, _processor_seconds

INTERVAL = 4
SHAPES = ((4, 1), (8, 1), (8, 2), (16, 1), (2, 2), (8, 4), (1, 4))  # rows x accumulated
ALONE = 1e6  # of the consistency, beside a task of 1: what is differentiated is that term
Rule = Callable[[int, int, int, int], tuple[int, ...]]


def by_micro_batch(turn: int, rows: int, interval: int, accumulated: int) -> tuple[int, ...]:
    """The rule before: the whole of every n-th."""
    return tuple(range(rows)) if turn % interval == 0 else ()


RULES: tuple[Rule, ...] = (by_micro_batch, rows_met)


class Passes:
    """Gradients of steps by the objective's own passes, on documents drawn at random."""

    def __init__(self, draws: int) -> None:
        made = Gradients()
        self.draws, self.documents, self.model = draws, made.documents, made.student.train()
        install(self.model.get_base_model())
        self.switch = TeacherSwitch(self.model.get_base_model())
        self.config = RegularizerConfig(lambda_consistency=1.0).resolved("nlg")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        found = [self.gradient(rows, None, 1) for rows in self.documents.split(16)]
        self.mean = torch.stack(found).sum(0) / len(self.documents)

    def gradient(self, rows: Tensor, met: tuple[int, ...] | None, factor: int) -> Tensor:
        """Of the sum over a micro-batch's documents."""
        request = StepRequest(
            self.config,
            Lambdas(ALONE * factor, 0.0, 0.0),
            switch=self.switch,
            teacher_rows=None if met is None or len(met) == len(rows) else met,
        )
        self.model.zero_grad()
        self.model(input_ids=rows, labels=rows, ba_lora=request).loss.backward()
        return torch.cat([p.grad.flatten() for p in self.trained]).double() / ALONE

    def variance(self, rows: int, accumulated: int, rule: Rule) -> float:
        """Of a step's mean over its documents, over the squared norm of the whole data's."""
        torch.manual_seed(1)  # the same documents for each rule
        total = 0.0
        for step in range(self.draws):
            found = torch.zeros_like(self.mean)
            for micro in range(accumulated):
                documents = self.documents[torch.randint(len(self.documents), (rows,))]
                met = rule(step * accumulated + micro, rows, INTERVAL, accumulated)
                if met:
                    found += self.gradient(documents, met, INTERVAL)
            total += float((found / (rows * accumulated) - self.mean).square().sum())
        return total / self.draws / float(self.mean.square().sum())


def variances(draws: int) -> str:
    """The table of variances at equal cost, by passes of the code, all in one run."""
    passes = Passes(draws)
    rows = []
    for shape in SHAPES:
        found = [passes.variance(*shape, rule) for rule in RULES]
        turns = range(INTERVAL * shape[1])
        ran = [sum(bool(rule(t, shape[0], INTERVAL, shape[1])) for t in turns) / INTERVAL for rule in RULES]
        rows.append((f"{shape[0]} x {shape[1]}", *(f"{each:.2f}" for each in found), *(f"{each:g}" for each in ran)))
    header = (
        "rows x accumulated",
        "by micro-batch (before)",
        "by row",
        "its passes a step, before",
        "by row",
    )
    return table(header, rows)


def at_step_0(options: argparse.Namespace, folder: Path) -> str:
    """The consistency a token, nats, of a student that still is the teacher: the rounding of fewer rows."""
    trainer = Bench(options, torch.device("cpu"), folder).ba_lora_trainer(lambda_svd=0.0)
    ids = next(iter(trainer.get_train_dataloader()))["input_ids"]
    rows = []
    for kind in (torch.float32, torch.bfloat16):
        model = trainer.model.to(kind)
        config = RegularizerConfig(lambda_consistency=1.0).resolved("nlg")
        found = []
        for met in (None, rows_met(0, len(ids), INTERVAL, 1)):
            switch = TeacherSwitch(model.get_base_model())
            request = StepRequest(config, Lambdas(1.0, 0.0, 0.0), switch=switch, teacher_rows=met)
            with torch.no_grad():
                out = model(input_ids=ids, labels=ids, ba_lora=request)
            found.append(float(out.consistency / (out.count if met is None else out.taught)))
        rows.append((str(kind).removeprefix("torch."), *(f"{each:.1e}" for each in found)))
    return table(("", "teacher on all rows", "on one of 4"), rows)


def steps(options: argparse.Namespace, folder: Path, bench_of: type[Bench]) -> str:
    """Processor seconds of a step with one micro-batch, the mean over an interval; every call is as many steps."""
    bench = bench_of(options, torch.device("cpu"), folder)
    made = {
        "no terms": _several(bench, lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0),
        "teacher on all rows": _several(bench, lambda_svd=0.0),
        "every 4th micro-batch (before)": _several(bench, by_micro_batch, lambda_svd=0.0, teacher_interval=INTERVAL),
        "every 4th row": _several(bench, lambda_svd=0.0, teacher_interval=INTERVAL),
    }
    peaks = measure(made, 0, torch.device("cpu"))
    took = _processor_seconds(made, options.repeats)
    rows = [
        (name, f"{seconds / INTERVAL:.3f}", f"{seconds / took['no terms']:.2f}", f"{peaks[name].peak_mib:.0f}")
        for name, seconds in took.items()
    ]
    return table(("", "processor seconds a step", "to no terms", "peak MiB"), rows)


def _several(bench: Bench, rule: Rule = rows_met, **terms: Any) -> Callable[[], None]:
    trainer = bench.ba_lora_trainer(**terms)
    one = bench.step(trainer)

    def run() -> None:
        with mock.patch.object(teacher_rows, "rows_met", rule):
            for _ in range(INTERVAL):
                one()
                trainer.state.global_step += 1

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--terms", default="variance,rounding,steps", help="which tables")
    options = parser.parse_args()
    options.checkpointing = False
    quiet()
    torch.set_num_threads(1)
    print(f"`python -m benchmarks.teacher_rows` on {machine(torch.device('cpu'))}\n")
    if "variance" in options.terms:
        print(variances(options.draws), end="\n\n")
    if "rounding" in options.terms:
        with tempfile.TemporaryDirectory() as folder:
            print(at_step_0(options, Path(folder)), end="\n\n")
    if "steps" in options.terms:
        for bench in (Bench, UpperHalf):
            with tempfile.TemporaryDirectory() as folder:
                print(steps(options, Path(folder), bench), end="\n\n")


if __name__ == "__main__":
    main()
