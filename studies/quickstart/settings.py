"""Settings of the quickstart and its command line; free of heavy imports, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HOSTS = ("axolotl", "trl")
METHOD_KEYS = ("lora", "pissa", "ba-lora-paper", "ba-lora-iclr2026", "ba-lora-visible")
DEFAULT_METHODS = {
    "axolotl": ("lora", "pissa", "ba-lora-paper", "ba-lora-visible"),  # each is a process of its own
    "trl": METHOD_KEYS,
}
DEFAULT_OUTPUT = {"axolotl": Path("outputs/quickstart"), "trl": Path("outputs/quickstart-trl")}


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


@dataclass(frozen=True)
class Options:
    """One quickstart run: which host trains, where files go, which methods it compares, both trainings' settings."""

    host: str
    output_dir: Path
    cache_dir: Path
    methods: tuple[str, ...]
    threads: int
    pretraining: PretrainingSettings
    finetuning: FinetuningSettings


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m studies.quickstart`."""
    result = argparse.ArgumentParser(
        prog="python -m studies.quickstart",
        description="Fine-tunes one tiny pre-trained model with LoRA, PiSSA and BA-LoRA and compares them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--host", choices=HOSTS, default="axolotl", help="what fine-tunes: `axolotl train`, or TRL in this process")
    add(
        "--output-dir", type=Path, help="adapters and results.json go here (outputs/quickstart, outputs/quickstart-trl)"
    )
    add("--cache-dir", type=Path, default=Path(".cache/quickstart"), help="the pre-trained model is kept here")
    add("--steps", type=positive, default=FinetuningSettings.steps, help="optimizer steps of every fine-tuning")
    add("--pretrain-steps", type=positive, default=PretrainingSettings.steps, help="optimizer steps of pre-training")
    add("--methods", nargs="+", choices=METHOD_KEYS, metavar="METHOD", help=", ".join(METHOD_KEYS))
    add("--seed", type=int, default=FinetuningSettings.seed, help="of the fine-tuning; pre-training keeps its own")
    # one: the model gains half again from two, and loses many times that where another process wants the second core
    add("--threads", type=positive, default=1, help="CPU threads for PyTorch")
    return result


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Options from `arguments`, by default those of the process; methods come in the table's order, each once."""
    given = parser().parse_args(arguments)
    methods = given.methods or DEFAULT_METHODS[given.host]
    return Options(
        host=given.host,
        output_dir=given.output_dir or DEFAULT_OUTPUT[given.host],
        cache_dir=given.cache_dir,
        methods=tuple(key for key in METHOD_KEYS if key in methods),
        threads=given.threads,
        pretraining=PretrainingSettings(steps=given.pretrain_steps),
        finetuning=FinetuningSettings(steps=given.steps, seed=given.seed),
    )
