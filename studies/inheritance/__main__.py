"""Runs the study, or what is left of it: `python -m studies.inheritance --model DIR_OR_NAME --data DIR`.

Without --model only the quickstart's tiny Llama is run, which needs no files. DIR has gsm8k_train.jsonl and
gsm8k_test.jsonl. Every run is kept in `runs/` of the study's folder as soon as it has finished and is not repeated;
`report.md` beside it is written from them. The pre-trained models are kept in .cache/inheritance.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import records
from ..common.running import chosen, free, parser, run_study
from .cells import COLOUR, METHODS, TINY_FAULTS, base_cell, cells

if TYPE_CHECKING:
    from .setups import Setup

FILES = ("gsm8k_train.jsonl", "gsm8k_test.jsonl")
SEEDS = (1, 2, 3, 4, 5)
LARGE_SEEDS = (1, 2)
ORIGINAL = "original"  # the larger model without its fault
QUICK = ("lora", "pissa", "ba-iclr2026", "consistency-0.3")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    made = parser("studies.inheritance", __doc__)
    made.add_argument("--model", help="a causal language model to make biased: directory or hub name")
    made.add_argument("--model-name", help="what the report calls it; default: the last part of --model")
    made.add_argument("--data", type=Path, help=f"folder of {', '.join(FILES)}")
    options = made.parse_args(arguments)
    if options.model is not None and not options.report:
        for name in FILES:
            if options.data is None or not (options.data / name).is_file():
                made.error(f"--model needs --data DIR with {name}")
    return options


def sizes_of(quick: bool) -> Any:
    """The sizes of the whole study, or of the quick one."""
    from .train import Sizes

    sizes = Sizes()
    return replace(sizes, pretrain_steps=200, steps=20, biased_steps=40, large_steps=8, test=8) if quick else sizes


def run_model(
    made: Callable[[], Setup], runs: records.Runs, bases: Sequence[str], asked: Sequence[records.Cell]
) -> None:
    """Runs one model's cells that have no record; the model is made only where there are some."""
    wanted = [*map(base_cell, bases), *asked]
    if all(runs.path(cell).is_file() for cell in wanted):
        return
    setup = made()
    for fault in bases:
        runs.once(base_cell(fault), partial(setup.base, fault))
    for cell in asked:
        ran = runs.once(cell, partial(setup.run, cell.setting))
        print(f"{cell.name}: {'done' if ran else 'was there'}", flush=True)
        free()


def run_all(options: argparse.Namespace, folder: Path) -> None:
    """The tiny model's cells, then the larger one's. Each model has a folder of records of its own."""
    from .setups import large_setup, tiny_setup

    sizes = sizes_of(options.quick)
    shared: dict[str, Any] = {"python": ".".join(map(str, sys.version_info[:2])), **asdict(sizes)}
    methods = QUICK if options.quick else tuple(METHODS)
    seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    asked = chosen(cells(TINY_FAULTS, seeds, methods), options.cells)
    runs = records.Runs(folder / "runs" / "tiny", {"model": "the quickstart's Llama", **shared})
    run_model(lambda: tiny_setup(sizes), runs, TINY_FAULTS, asked)
    if options.model is None:
        return
    name = options.model_name or Path(options.model).name
    digests = {file: hashlib.sha256((options.data / file).read_bytes()).hexdigest()[:16] for file in FILES}
    runs = records.Runs(folder / "runs" / "large", {"model": name, "data": digests, **shared})
    seeds = options.seeds or (LARGE_SEEDS[:1] if options.quick else LARGE_SEEDS)
    asked = chosen(cells((COLOUR,), seeds, methods), options.cells)
    run_model(lambda: large_setup(options.model, name, options.data, sizes), runs, (ORIGINAL, COLOUR), asked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then writes the report."""
    from .report import write_report

    return run_study(parse(arguments), "inheritance", run_all, write_report)


if __name__ == "__main__":
    sys.exit(main())
