"""Runs the study, or what is left of it: `python -m studies.glue --model DIR_OR_NAME --data DIR`.

DIR holds one directory a task (rte, cola, sst2) with train.jsonl and validation.jsonl, as `balora glue` reads them;
left out: GLUE from the hub. Left out, the model is the MiniLM of `requirements/study.txt`. Every run is kept in `runs/`
of the study's folder as soon as it has finished and is not repeated; `report.md` beside it is written from them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..common import records
from ..common.running import chosen, free, parser, run_study
from .cells import METHODS, TASKS, study_cells, tuning_cells

SEEDS = (1, 2, 3, 4, 5)
QUICK_METHODS = ("lora", "pissa", "ba-paper", "ba-iclr2026")
QUICK_TASKS = ("sst2",)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    made = parser("studies.glue", __doc__)
    made.add_argument("--model", help="an encoder: directory or hub name; default: MiniLM of an installed package")
    made.add_argument("--model-name", help="what the report calls it; default: the last part of --model")
    made.add_argument("--data", help="folder of the tasks' folders; default: the hub")
    made.add_argument("--longer", type=int, default=1, help="so many times the steps, where there is time (a GPU)")
    return made.parse_args(arguments)


def sizes_of(options: argparse.Namespace) -> Any:
    """The sizes of the whole study, or of the quick one."""
    from .train import Sizes

    sizes = Sizes(test=200, held_out=120) if options.quick else Sizes()
    return replace(sizes, steps={task: options.longer * steps for task, steps in sizes.steps.items()})


def shared_of(options: argparse.Namespace, name: str, sizes: Any) -> dict[str, Any]:
    """What all runs have in common; data by the digests of their files."""
    from balora_plugin.glue.records import data_digest
    from balora_plugin.glue.tasks import TASKS as GLUE_TASKS

    digests = {task: data_digest(options.data, GLUE_TASKS[task]) for task in TASKS}
    return {"model": name, "data": digests, **asdict(sizes)}


def best_rates(found: Sequence[records.Record]) -> dict[tuple[str, str], float]:
    """By task and tuned method the rate with the least loss on the held-out rows; of equals the lowest."""
    losses: dict[tuple[str, str], dict[float, float]] = {}
    for record in found:
        setting = record["setting"]
        if "rate" in setting:
            losses.setdefault((setting["task"], setting["method"]), {})[setting["rate"]] = record["loss"]
    return {key: min(sorted(by_rate), key=lambda rate: by_rate[rate]) for key, by_rate in losses.items()}


def run_all(options: argparse.Namespace, folder: Path) -> None:
    """Tunes, then runs every cell that is asked for and has no record."""
    from transformers import AutoTokenizer

    from ..common.encoder import PACKAGE, encoder_path
    from .data import task_data
    from .train import Setup, run

    sizes = sizes_of(options)
    model = options.model or str(encoder_path())
    name = options.model_name or (Path(options.model).name if options.model else PACKAGE)
    runs = records.Runs(folder / "runs", shared_of(options, name, sizes))
    tasks = QUICK_TASKS if options.quick else TASKS
    methods = QUICK_METHODS if options.quick else tuple(METHODS)
    seeds = options.seeds or (SEEDS[:1] if options.quick else SEEDS)
    tuning = [one for one in tuning_cells(tasks) if one.setting["method"] in methods]
    cells = chosen(list(study_cells(seeds, tasks, methods)), options.cells)
    if all(runs.path(one).is_file() for one in (*tuning, *cells)):
        return
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = {task: task_data(task, options.data, tokenizer, sizes) for task in tasks}
    setup = Setup(model, tokenizer, data, sizes)

    def once(cell: records.Cell, rate: float) -> None:
        ran = runs.once(cell, partial(run, cell.setting, rate, setup))
        print(f"{cell.name}: {'done' if ran else 'was there'}", flush=True)
        free()

    runs.once(records.Cell("data", {}), lambda: truth(data))
    for cell in tuning:
        once(cell, cell.setting["rate"])
    rates = best_rates(records.read(runs.folder))
    for cell in cells:
        once(cell, rates[cell.setting["task"], METHODS[cell.setting["method"]].rate_of])


def truth(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the test rows are: by task gold labels, score, the class that is made rare and the rows to train on."""
    return {
        "tasks": {
            name: {
                "gold": [row["labels"] for row in task.test],
                "score": task.score,
                "minority": task.minority,
                "train": len(task.train),
            }
            for name, task in data.items()
        }
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, then writes the report."""
    from .report import write_report

    return run_study(parse(arguments), "glue", run_all, write_report)


if __name__ == "__main__":
    sys.exit(main())
