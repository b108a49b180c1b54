"""What a training on given GPUs takes by the shapes of its model: bytes, FLOP, bytes moved, seconds by both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..configs.bases import config_of
from ..configs.counted import Size, at_layers, layers_of

# Of the passes over (rows, V) logits in eager PyTorch, KL and entropy at T = 1: 26 streams of float32 (exponentials 4,
# their sums 2, the hit 1, the divergence 7, p log p 4, the gradient 8), and 24 bytes for what products give in bfloat16
LOGIT_BYTES = 26 * 4 + 24
# the start's iteration at rank 128, measured (docs/benchmarks.md): columns from both sides, 2 FLOP an entry and column
START_COLUMNS = (1248, 3360)
CORE = (31e9, 20e9)  # FLOP/s of one CPU core there with either, all of the start's time counted as its products
DOCUMENT_BYTES = 21  # of the index of a teacher cache in memory
TOP_K_BYTES = 6 * 128 + 4
USED = 0.4  # of a device's peak, as docs/paper.md takes it


@dataclass(frozen=True)
class Gpu:
    """A device: dense bfloat16 FLOP/s, bytes/s of its memory and of its links to the others, and GiB."""

    name: str
    flop: float
    memory: float
    link: float
    gib: int


A40 = Gpu("A40", 149.7e12, 696e9, 32e9, 48)
H100 = Gpu("H100", 989e12, 3350e9, 450e9, 80)


@dataclass(frozen=True)
class Setup:
    """A model of example_configs/paper/ on some GPUs; more than one share the base by FSDP2."""

    name: str
    yaml: str
    gpu: Gpu
    gpus: int = 1

    @property
    def title(self) -> str:
        return f"{self.name} on {self.gpus} x {self.gpu.name}"


SETUPS = (
    Setup("LLaMA-2-7B", "paper/llama2-7b.yaml", A40),
    Setup("LLaMA-3-8B", "paper/llama3-8b.yaml", H100),
    Setup("LLaMA-3-70B", "paper/llama3-70b.yaml", H100, 8),
    Setup("Mixtral-8x7B", "paper/mixtral-8x7b.yaml", H100, 8),
)


@dataclass(frozen=True)
class Needs:
    """What one GPU takes.

    Attributes:
        held: Bytes held all along, by part, whole.
        passing: Bytes beside them at the fullest moment.
        moment: Which it is.
        whole: Bytes of the layers that are gathered at a time, 0 on one GPU.
        flop, moved: FLOP, and bytes between the device and its memory, of an optimizer step, by part.
        gathered: Bytes that come over its links in an optimizer step.
        tokens: Of an optimizer step, on this GPU.
        start: FLOP of the start by the fewest and the most columns measured, of the whole model.
        hidden: Bytes that a teacher cache keeps of a token.
    """

    held: dict[str, float]
    passing: float
    moment: str
    whole: float
    flop: dict[str, float]
    moved: dict[str, float]
    gathered: float
    tokens: int
    start: tuple[float, float]
    hidden: int

    def bytes_on(self, gpus: int) -> float:
        """Returns the sum on each of so many GPUs."""
        return sum(self.held.values()) / gpus + self.whole + self.passing

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """Returns what each part takes: its FLOP at a part of the peak, or its bytes at the memory's bandwidth."""
        return {
            part: max(self.flop.get(part, 0.0) / (USED * gpu.flop), self.moved[part] / gpu.memory)
            for part in self.moved
        }


def needs(setup: Setup, values: dict[str, Any]) -> Needs:
    """Counts a setup's training from two models of few layers; `values`: of its YAML."""
    layers, period = layers_of(values)
    few, more = at_layers(values, 2 * period), at_layers(values, 3 * period)

    def extended(of: Callable[[Size], float]) -> float:
        return of(few) + (of(more) - of(few)) * (layers - 2 * period) / period

    def by_part(of: Callable[[Size], dict[str, float]]) -> dict[str, float]:
        return {part: low + (of(more)[part] - low) * (layers - 2 * period) / period for part, low in of(few).items()}

    held, passing = by_part(lambda size: size.held), by_part(lambda size: size.passing)
    moment = max(passing, key=passing.__getitem__)
    micro = int(values["micro_batch_size"]) * int(values["sequence_len"])
    steps = int(values["gradient_accumulation_steps"])
    config = config_of(values).get_text_config()
    flop = {part: micro * steps * count for part, count in by_part(lambda size: size.flop).items()}
    adapted, adapter = extended(lambda size: size.adapted), held["frozen_factors"] + held["trained"]
    return Needs(
        held=held,
        passing=passing[moment],
        moment=moment,
        whole=2.0 * few.layer if setup.gpus > 1 else 0.0,
        flop={**flop, "spectrum": steps * spectrum_flop(min(micro, 1024), config.hidden_size)},
        moved={
            **moved(held, extended(lambda size: size.streamed), config, micro, steps),
            "optimizer": 2 * (2 * held["trained"] + held["optimizer"]) / setup.gpus,
        },
        gathered=steps * (3 * held["weights"] + 2 * adapter) * (setup.gpus - 1) / setup.gpus,
        tokens=micro * steps,
        start=(2 * START_COLUMNS[0] * adapted, 2 * START_COLUMNS[1] * adapted),
        hidden=2 * config.hidden_size,
    )


def spectrum_flop(rows: int, width: int) -> float:
    """Products with the head's factor, forward and back, Gram matrix and gradient, eigenvectors (12 M^3)."""
    return 4.0 * rows * width**2 + 4.0 * rows**2 * width + 12.0 * rows**3


def moved(held: dict[str, float], streamed: float, config: Any, micro: int, steps: int) -> dict[str, float]:
    """Returns the bytes between device and memory of a step's passes: every product reads what it is made of once."""
    base = held["weights"]
    adapter = held["frozen_factors"] + held["trained"]
    head = config.vocab_size * config.hidden_size * 2.0
    rows = micro * streamed * 2.0  # bfloat16
    spectrum = 8.0 * (2 * config.hidden_size**2 + 4 * min(micro, 1024) * config.hidden_size)
    chunks = math.ceil(micro * config.vocab_size * 4 / (128 << 20))  # each reads the head twice
    return {
        "student": steps * (base + adapter + rows),
        "recomputed": steps * (base + adapter + rows),
        "backward": steps * (base + adapter + 2 * rows),
        "teacher": steps * (base + rows),
        "head": steps * (2 * chunks * head + micro * config.vocab_size * LOGIT_BYTES),
        "teacher's head": 0.0,  # in one product with the student's
        "spectrum": steps * spectrum,
    }
