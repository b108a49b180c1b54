"""Settings of the quickstart and its command line; free of heavy imports, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from balora_plugin.config import RECOMMENDED_RATE

HOSTS = ("axolotl", "trl")
MODELS = ("smollm2", "tiny")
METHOD_KEYS = ("lora", "pissa", "pissa-delta", "ba-lora", "ba-lora-paper", "ba-lora-iclr2026", "ba-lora-visible")
DEFAULT_METHODS = {
    "smollm2": ("lora", "pissa-delta", "ba-lora"),
    "tiny": ("lora", "pissa", "ba-lora-paper", "ba-lora-visible"),
}
MOST_THREADS = 4  # more gain little on batches of this size


@dataclass(frozen=True)
class PretrainingSettings:
    """Everything that decides the base model besides the corpus; lengths are in tokens."""

    steps: int = 1000
    seed: int = 0
    vocabulary: int = 2048
    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    positions: int = 512
    chunk: int = 128
    batch: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.05  # share of the steps


@dataclass(frozen=True)
class FinetuningSettings:
    """What all methods share; lengths are in tokens."""

    steps: int = 60
    seed: int = 0
    batch: int = 16
    learning_rate: float = 1e-3
    max_length: int = 256
    plain_rate: float | None = None  # of an adapter that starts as a LoRA, where it is another one
    train_pairs: int | None = None  # None: all there are
    held_out_pairs: int | None = None
    other_pairs: int | None = None

    def rate_of(self, start: str | bool) -> float:
        """The learning rate for a start, which is PEFT's `init_lora_weights`."""
        return self.plain_rate if start is True and self.plain_rate is not None else self.learning_rate


# SmolLM2: one pass over as many pairs as the steps take; both rates are docs/choose.md's; 64 tokens, to which Axolotl
# pads every batch, hold the chat template and one sentence
REAL = FinetuningSettings(
    steps=20,
    batch=4,
    learning_rate=RECOMMENDED_RATE,
    max_length=64,
    plain_rate=4 * RECOMMENDED_RATE,
    train_pairs=80,
    held_out_pairs=40,
    other_pairs=40,
)


@dataclass(frozen=True)
class Options:
    """One quickstart run: model and host, where files go, which methods it compares, both trainings' settings.

    `again`: finished runs are run once more.
    """

    model: str
    host: str
    output_dir: Path
    cache_dir: Path
    methods: tuple[str, ...]
    threads: int
    pretraining: PretrainingSettings
    finetuning: FinetuningSettings
    again: bool = False


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def default_threads(model: str) -> int:
    """One per core but one: threads wait for each other, and a shared core slows all. The tiny model takes one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if model == "tiny" else max(1, min(cores - 1, MOST_THREADS))


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m studies.quickstart`."""
    result = argparse.ArgumentParser(
        prog="python -m studies.quickstart",
        description="Fine-tunes SmolLM2-135M-Instruct with LoRA, PiSSA and BA-LoRA and compares them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--tiny", action="store_true", help="a 1.1M-parameter model that is pre-trained on the spot, for tests")
    add("--host", choices=HOSTS, default="axolotl", help="what fine-tunes: `axolotl train`, or TRL in this process")
    add("--output-dir", type=Path, help="adapters and results go here (outputs/quickstart, -tiny and -trl behind it)")
    add("--cache-dir", type=Path, default=Path(".cache/quickstart"), help="the pre-trained model is kept here")
    add("--steps", type=positive, help=f"optimizer steps of every fine-tuning ({REAL.steps}; the tiny model's: 60)")
    add("--pretrain-steps", type=positive, default=PretrainingSettings.steps, help="of the tiny model's pre-training")
    add("--again", action="store_true", help="run finished runs once more")
    add("--methods", nargs="+", choices=METHOD_KEYS, metavar="METHOD", help=", ".join(METHOD_KEYS))
    add("--seed", type=int, default=FinetuningSettings.seed, help="of the fine-tuning; pre-training keeps its own")
    add(
        "--threads",
        type=positive,
        help=f"CPU threads for PyTorch (one per core but one, at most {MOST_THREADS}; tiny: 1)",
    )
    return result


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Options from `arguments`, by default those of the process; methods come in the table's order, each once."""
    given = parser().parse_args(arguments)
    model = "tiny" if given.tiny else "smollm2"
    ending = ("-tiny" if given.tiny else "") + ("-trl" if given.host == "trl" else "")
    methods = given.methods or DEFAULT_METHODS[model]
    finetuning = FinetuningSettings() if given.tiny else REAL
    steps = given.steps or finetuning.steps
    pairs = None if given.tiny else steps * finetuning.batch
    return Options(
        model=model,
        host=given.host,
        output_dir=given.output_dir or Path(f"outputs/quickstart{ending}"),
        cache_dir=given.cache_dir,
        methods=tuple(key for key in METHOD_KEYS if key in methods),
        threads=given.threads or default_threads(model),
        pretraining=PretrainingSettings(steps=given.pretrain_steps),
        finetuning=replace(finetuning, steps=steps, seed=given.seed, train_pairs=pairs),
        again=given.again,
    )
