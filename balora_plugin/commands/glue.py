"""Fine-tune and score a classifier on GLUE by the paper's recipe, over learning rates and seeds; test it on GLUE-X.

  balora glue --recipe roberta-large --task rte --output outputs/glue

Data come from the hub, or with --data from <DIR>/<task>/{train,validation}.jsonl. Runs that have finished are kept in
<OUTPUT>/runs and not repeated, unless a later call asks for more of them or the files have changed.
<OUTPUT>/results.json and results.md hold mean and standard deviation over seeds.
docs/glue.md describes recipes, files and how the sets of GLUE-X are prepared.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..glue.tasks import METHODS, RECIPES, TASKS
from ._models import quiet
from ._options import Option, Several, Values, Words, check_seeds
from ._output import check_directory, show_markdown

if TYPE_CHECKING:
    from ..glue.job import Job
    from ..glue.recipe import Recipe

HELP = "fine-tune on GLUE by the paper's recipe, test on GLUE-X"

PARAMETERS = (
    Option("--recipe", required=True, metavar="YAML", help=f"the settings: a file, or one of {', '.join(RECIPES)}"),
    Option("--output", required=True, metavar="DIR", help="where runs and results are written"),
    Several("--task", type=Words(list(TASKS)), default=list(TASKS), help="default: all nine"),
    Several("--method", type=Words(METHODS), default=["ba_lora"], help="default: ba_lora"),
    Option("--model", metavar="MODEL", help="another model than the recipe's: a directory or a hub id"),
    Option("--data", metavar="DIR", help="GLUE as JSONL files here, instead of the hub's"),
    Option("--glue-x", metavar="DIR", help="test every model on GLUE-X's sets: <DIR>/<set>.jsonl"),
    Several("--seeds", type=click.IntRange(min=0), metavar="N", help="instead of the recipe's"),
    Several("--learning-rates", type=float, metavar="LR", help="instead of the recipe's grids"),
    Option("--max-steps", type=int, metavar="N", help="stop every run after N optimizer steps (to try)"),
    Option("--limit", type=click.IntRange(min=0), default=0, metavar="N", help="only N rows of each file (to try)"),
    Several(
        "--separation",
        type=click.IntRange(min=0),
        metavar="STEP",
        help="draw the classes in the last layer after these optimizer steps and the last one, methods side by side",
    ),
    Option("--keep", is_flag=True, help="keep every run's adapter, in <OUTPUT>/adapters"),
)


def run(args: Values) -> int:
    """Runs the subcommand; returns its exit code."""
    from ..glue import records as kept
    from ..glue import report, separation
    from ..glue import run as runs
    from ..glue.metrics import score
    from ..glue.recipe import read_recipe, recipe_file

    check_directory(args.output)
    check_seeds(args.seeds or ())
    if args.separation:
        separation.check_matplotlib()
        if "stsb" in args.task:
            raise ValueError("--separation with --task stsb: scores are no classes; name other tasks.")
    score((), [1], [1])  # says now, not after the first run, that scikit-learn is missing
    for key in ("data", "glue_x"):
        value = getattr(args, key)
        if value is not None and not Path(value).is_dir():
            raise ValueError(f"--{key.replace('_', '-')} {value} is no directory.")
    recipe = _changed(read_recipe(recipe_file(args.recipe)), args)
    tasks = [TASKS[name] for name in dict.fromkeys(args.task)]
    seeds = args.seeds or list(recipe.seeds)
    methods = list(dict.fromkeys(args.method))
    jobs = runs.jobs_of(recipe, tasks, methods, seeds, args.limit, args.data)
    records = []
    for number, job in enumerate(jobs, 1):
        what = f"{job.task} {job.method}, learning rate {job.learning_rate:g}, seed {job.seed}"
        name = Path(job.file).stem
        wanted = kept.Wanted(
            glue_x=args.glue_x,
            keep=str(Path(args.output, "adapters", name)) if args.keep else None,
            steps=args.separation or (),
            taps=str(Path(args.output, "separation", f"{name}.npz")) if args.separation else None,
        )
        before = kept.stored(args.output, job)
        if before is not None and wanted.held_by(before, TASKS[job.task]):
            record = before
        else:
            with quiet():
                record = runs.run_job(
                    job,
                    TASKS[job.task],
                    data=args.data,
                    glue_x=args.glue_x,
                    keep=wanted.keep,
                    watch=None if wanted.taps is None else (wanted.with_steps_of(before), wanted.taps),
                )
            record = kept.carried_over(record, before, wanted)
            kept.store(args.output, job, record)
        first = record["scores"][TASKS[job.task].splits[0]]
        shown = ", ".join(f"{name} {value:.2f}" for name, value in first.items())
        print(f"[{number}/{len(jobs)}] {what}: {shown}", file=sys.stderr)
        records.append(record)
    if args.separation:
        _draw(args.output, jobs, args.separation)
    entries = report.summary(records)
    table = report.markdown(entries)
    Path(args.output, "results.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    Path(args.output, "results.md").write_text(table + "\n", encoding="utf-8")
    show_markdown(table)
    return 0


def _draw(output: str, jobs: list[Job], steps: list[int]) -> None:
    """Writes a PNG and a JSON of silhouettes for each task, learning rate and seed.

    Methods are in rows, `steps` and the last one in columns.
    """
    from ..glue import separation

    groups: dict[str, dict[str, list[Any]]] = {}
    for job in jobs:
        snapshots = separation.load_snapshots(str(Path(output, "separation", f"{Path(job.file).stem}.npz")))
        snapshots = [snapshot for snapshot in snapshots if snapshot.step in (*steps, snapshots[-1].step)]
        groups.setdefault(f"{job.task}-{job.learning_rate:g}-{job.seed}", {})[job.method] = snapshots
    for name, methods in groups.items():
        path = Path(output, "separation", name)
        scores = separation.figure(methods, f"{path}.png", name)
        Path(f"{path}.json").write_text(json.dumps({"silhouette": scores}, indent=1), encoding="utf-8")
        print(f"wrote {path}.png", file=sys.stderr)


def _changed(recipe: Recipe, args: Values) -> Recipe:
    """Returns the recipe with what the command line says otherwise."""
    changes: dict[str, Any] = {}
    if args.learning_rates:
        changes["learning_rates"] = tuple(args.learning_rates)
    if args.max_steps is not None:
        changes["max_steps"] = args.max_steps
    return dataclasses.replace(
        recipe,
        model=args.model or recipe.model,
        defaults=dataclasses.replace(recipe.defaults, **changes),
        tasks={name: dataclasses.replace(settings, **changes) for name, settings in recipe.tasks.items()},
    )
