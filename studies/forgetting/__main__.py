"""Runs the study, or what is left of it: `python -m studies.forgetting --model DIR_OR_NAME --data DIR`.

Every run is kept in `runs/` of the study's folder as soon as it has finished and is not repeated; `report.md` beside
it is written from them. DIR has gsm8k_train.jsonl, gsm8k_test.jsonl and crows_pairs.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..common import records
from ..common.running import chosen, free, parser, run_study
from .data import ANCHORS

FILES = ("gsm8k_train.jsonl", "gsm8k_test.jsonl", "crows_pairs.csv")
QUICK = ("lora-1e-3", "pissa-3e-4", "pissa-cr0.3", "lora-cr0.3")
SEEDS = (1, 2, 3)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    made = parser("studies.forgetting", __doc__)
    made.add_argument("--model", help="a causal language model: directory or hub name (not needed with --report)")
    made.add_argument("--model-name", help="what the report calls it; default: the last part of --model")
    made.add_argument("--data", type=Path, help=f"folder of {', '.join(FILES)}")
    options = made.parse_args(arguments)
    if not options.report and (options.model is None or options.data is None):
        made.error("give --model and --data, or --report")
    for name in FILES if not options.report else ():
        if not (options.data / name).is_file():
            made.error(f"--data {options.data} has no {name}")
    return options


def sizes_of(quick: bool) -> Any:
    """The sizes of the whole study, or of the quick one."""
    from .train import Sizes

    if not quick:
        return Sizes()
    return Sizes(steps=8, looks=(8,), scales=(0.5,), test=16, documentation=12, instructions=12, per_kind=2)


def shared_of(options: argparse.Namespace, sizes: Any) -> dict[str, Any]:
    """What all runs have in common."""
    digests = {name: hashlib.sha256((options.data / name).read_bytes()).hexdigest()[:16] for name in FILES}
    name = options.model_name or Path(options.model).name
    sizes = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(sizes).items()}
    return {"model": name, "data": digests, "python": ".".join(map(str, sys.version_info[:2])), **sizes}


def setup_of(options: argparse.Namespace, sizes: Any, folder: Path) -> Any:
    """Model, rows and yardstick."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import data
    from .measure import Yardstick
    from .train import Setup

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, test, crows = (options.data / name for name in FILES)
    sets = {
        "task": data.problems(test, tokenizer, sizes.longest, sizes.test),
        "documentation": data.documentation(tokenizer, sizes.text, sizes.documentation),
        "instructions": data.instructions(tokenizer, sizes.text, sizes.instructions),
    }
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, sizes.measured_in))
    yardstick = Yardstick(base, sets, data.crows(crows, tokenizer, sizes.per_kind), tokenizer.pad_token_id)
    pool = data.problems(train, tokenizer, sizes.longest, sizes.pool)
    cache = Path(".cache/forgetting")
    anchors = cache.with_name("forgetting-anchors.jsonl")
    data.write_anchors(anchors, tokenizer, sizes.text, sizes.documentation)
    return Setup(options.model, tokenizer, pool, yardstick, cache, anchors, sizes)


def run_all(options: argparse.Namespace, folder: Path) -> None:
    """Runs every cell that is asked for and has no record."""
    from .cells import METHODS, cell
    from .train import run

    sizes = sizes_of(options.quick)
    runs = records.Runs(folder / "runs", shared_of(options, sizes))
    seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    methods = [name for name in (QUICK if options.quick else METHODS) if METHODS[name].can_run()]
    cells = chosen([cell(method, seed) for seed in seeds for method in methods], options.cells)
    left = [one for one in cells if not runs.path(one).is_file()]
    base = records.Cell("base", {"method": "base", "seed": 0})
    if not left and runs.path(base).is_file():
        return
    setup = setup_of(options, sizes, folder)
    look = setup.yardstick.look
    runs.once(base, lambda: {"tokens": setup.yardstick.counts(), "points": [{"step": 0, "scale": 0.0, **look()}]})
    for one in left:
        method, seed = one.setting["method"], one.setting["seed"]
        ran = runs.once(one, partial(run, METHODS[method], seed, setup))
        print(f"{one.name}: {'done' if ran else 'was there'}", flush=True)
        free()


def words(shared: dict[str, Any]) -> str:
    """The sizes, for the head of the report."""
    return (
        f"{shared['model']} on GSM8K's training set: {shared['steps']} steps of {shared['batch']} problems of at most "
        f"{shared['longest']} tokens (question and worked answer, without the calculator marks; loss on the answer), "
        f"each seed with rows of its own out of {shared['pool']}; rank {shared['rank']} on all linear layers, constant "
        f"rate after a warm-up, AdamW, gradients clipped at 1, computed in {shared['trained_in']}. Measured in "
        f"{shared['measured_in']} on {shared['test']} problems of the test set, {shared['instructions']} general "
        f"instructions with answers (`studies/forgetting/instructions.jsonl`), {shared['documentation']} beginnings of "
        f"docstrings of Python {shared['python']}'s standard library ({shared['text']} tokens) and "
        f"{shared['per_kind']} pairs of each kind of bias in CrowS-Pairs. Anchors are as long beginnings of {ANCHORS} "
        "other docstrings, one row for two problems. Nothing is tuned: every setting that was run is reported."
    )


def write_report(folder: Path, quick: bool) -> Path | None:
    """Writes the report of the records that there are; None without any."""
    from .report import report, write

    found = records.read(folder / "runs")
    base = next((record for record in found if record["cell"] == "base"), None)
    runs = [record for record in found if record["cell"] != "base"]
    if base is None or not runs:
        return None
    named = f' --model-name "{base["shared"]["model"]}"'  # records of another name are not read
    command = "python -m studies.forgetting --model MODEL --data DATA" + named + (" --quick" if quick else "")
    write(folder / "report.md", report(runs, base, {"command": command, "what": words(base["shared"])}))
    return folder / "report.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then writes the report."""
    return run_study(parse(arguments), "forgetting", run_all, write_report)


if __name__ == "__main__":
    sys.exit(main())
