"""Counts against measurements on a CPU: a step of three sizes of model, and how its time and memory grow."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from balora_plugin import BaLoraConfig, RegularizerConfig, get_ba_lora_model
from balora_plugin.memory.estimate import Workload
from balora_plugin.memory.twin import Twin, hollow
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.schedules import Lambdas
from benchmarks.measuring import machine, quiet, table

from ..configs.counted import flop_by_part

CPU = torch.device("cpu")
MIB = 2**20
TERMS = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.02, lambda_svd=0.0)


@dataclasses.dataclass(frozen=True)
class Point:
    """One step: rows of `length` tokens through a Llama of these sizes; with or without a teacher."""

    tokens: int = 512
    width: int = 256
    vocabulary: int = 8192
    rank: int = 16
    layers: int = 4
    length: int = 128
    taught: bool = True

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 32,
            vocab_size=self.vocabulary,
            max_position_embeddings=2048,
        )

    def adapter(self) -> BaLoraConfig:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        shape = {"r": self.rank, "lora_alpha": self.rank, "target_modules": targets, "task_type": "CAUSAL_LM"}
        return BaLoraConfig(**shape, init_lora_weights="pissa_fast")

    def terms(self) -> RegularizerConfig:
        return (TERMS if self.taught else dataclasses.replace(TERMS, lambda_consistency=0.0)).resolved("nlg")


@dataclasses.dataclass(frozen=True)
class Found:
    """FLOP and bytes counted, processor seconds and MiB measured."""

    flop: float
    counted_mib: float
    seconds: float
    mib: float


ONE = Point()
SIZES = [Point(width=width) for width in (128, 256, 512)]
SLOPES: dict[str, list[Point]] = {
    "tokens": [Point(tokens=tokens) for tokens in (256, 512, 1024, 2048)],
    "width": [Point(width=width) for width in (128, 256, 384, 512)],
    "vocabulary": [Point(vocabulary=size) for size in (4096, 8192, 16384, 32768)],
    "rank": [Point(rank=rank) for rank in (8, 16, 32, 64)],
}


def counted(point: Point) -> tuple[float, float]:
    """Returns FLOP of a step, and MiB at its fullest moment beside what is held."""
    twin = Twin(hollow(LlamaForCausalLM, point.config()), point.adapter())
    twin.like(twin.model)
    work = Workload(point.tokens // point.length, point.length, point.terms(), device_type="cpu")
    held = twin.held(work.optimizer)
    found = twin.estimate(work, held)
    flop = sum(flop_by_part(twin.model, {}, work).values()) * point.tokens
    passing = max(total for moment, total in found.by_moment.items() if moment != "optimizer") - held.total
    return flop, passing / MIB


def step_of(point: Point) -> Callable[[], None]:
    """A micro-batch through the model's forward with its terms, and back."""
    torch.manual_seed(0)
    model = get_ba_lora_model(LlamaForCausalLM(point.config()), point.adapter()).train()
    base = model.get_base_model()
    install(base)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(3, point.vocabulary, (point.tokens // point.length, point.length))
    lambdas = Lambdas(0.5 * point.taught, 0.02, 0.0)

    def step() -> None:
        model(input_ids=ids, labels=ids, ba_lora=StepRequest(config=point.terms(), lambdas=lambdas)).loss.backward()
        for p in parameters:
            p.grad = None

    return step


def allocated(step: Callable[[], None]) -> float:
    """MiB that PyTorch's allocator has out at most while it runs, above what it had before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes)) / MIB


def measured(point: Point, repeats: int = 3) -> Found:
    step = step_of(point)
    step()
    peak = allocated(step)
    samples = []
    for _ in range(repeats):
        began = time.process_time()
        step()
        samples.append(time.process_time() - began)
    return Found(*counted(point), statistics.median(samples), peak)


def slope(xs: list[float], ys: list[float]) -> float:
    """The power of x that y grows with, by least squares of logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def rows_of_sizes(known: dict[Point, Found]) -> Iterator[tuple[str, ...]]:
    for point in SIZES:
        found, without = known[point], known[dataclasses.replace(point, taught=False)]
        yield (
            str(point.width),
            f"{found.flop / 1e9:.0f}",
            f"{found.seconds:.2f}",
            f"{found.flop / found.seconds / 1e9:.0f}",
            f"{1 - without.flop / found.flop:.2f}",
            f"{1 - without.seconds / found.seconds:.2f}",
            f"{found.counted_mib:.0f}",
            f"{found.mib:.0f}",
        )


def rows_of_slopes(known: dict[Point, Found]) -> Iterator[tuple[str, ...]]:
    for name, points in SLOPES.items():
        xs = [float(getattr(point, name)) for point in points]
        found = [known[point] for point in points]
        ys: list[list[Any]] = [
            [getattr(f, field) for f in found] for field in ("flop", "seconds", "counted_mib", "mib")
        ]
        yield (name, " ".join(f"{x:.0f}" for x in xs), *(f"{slope(xs, values):.2f}" for values in ys))


def report() -> None:
    """Prints both tables."""
    quiet()
    torch.set_num_threads(1)
    print(f"`python -m integration.scaling --measure` on {machine(CPU)}, float32, processor seconds\n", flush=True)
    points = {
        *SIZES,
        *(dataclasses.replace(p, taught=False) for p in SIZES),
        *(p for ps in SLOPES.values() for p in ps),
    }
    known = {point: measured(point) for point in points}
    header = (
        "width",
        "GFLOP",
        "s",
        "GFLOP/s",
        "teacher, counted",
        "teacher, measured",
        "MiB, counted",
        "MiB, allocated",
    )
    print(table(header, list(rows_of_sizes(known))), flush=True)
    header = ("", "values", "FLOP", "seconds", "MiB, counted", "MiB, allocated")
    print(f"\n{table(header, list(rows_of_slopes(known)))}")
