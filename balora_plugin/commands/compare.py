"""Compare methods on your own data: learning rates and seeds of each, tables with intervals, and the report.

  balora compare --model MODEL --data rows.jsonl --output outputs/compare
  balora compare --model MODEL --data rows.jsonl --methods lora lora_terms --rates 2e-4 1e-3 --seeds 0 1 2 \\
      --output outputs/compare

Rows are `text`; `prompt`, `completion`; `messages`; `instruction` (`input`), `output`; or `text`, `label`, which is
classification. A fixed part of them is held out. Runs that have finished are kept in <OUTPUT>/runs and not repeated.
Written: <OUTPUT>/results.json, results.md and report/report.html. docs/compare.md says how to read them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.rules import LARGEST_RANK
from ..compare.plan import LORA_RATES, METHODS, PISSA_RATES
from ..findings import check_extra
from ._models import check_place, quiet
from ._options import Option, Several, Values, Words, check_seeds
from ._output import check_directory, show_markdown

if TYPE_CHECKING:
    from ..compare.cells import Data
    from ..compare.plan import Cell, GridSettings
    from ..compare.results import Results

HELP = "compare methods on your own data"

_RATES = "; ".join(
    f"{start} {' '.join(f'{rate:.0e}'.replace('e-0', 'e-') for rate in rates)}"
    for start, rates in (("LoRA's", LORA_RATES), ("PiSSA's, and full,", PISSA_RATES))
)
PARAMETERS = (
    Option("--model", required=True, metavar="MODEL", help="the pre-trained model: a directory or a hub id"),
    Option("--data", required=True, metavar="FILE", help="your rows: JSONL"),
    Option("--output", required=True, metavar="DIR", help="where runs and results are written"),
    Several("--methods", type=Words(METHODS), default=["lora", "pissa", "ba_lora"], help="default: lora pissa ba_lora"),
    Several("--rates", type=float, metavar="LR", help=f"default: by start, {_RATES}"),
    Several("--seeds", type=int, default=[0], metavar="N", help="default: 0"),
    Option("--steps", type=int, metavar="N", help="default: three passes, from 20 to 200 steps"),
    Option("--rank", type=int, default=16, metavar="R", help="of the adapters, alpha too (default: 16)"),
    Option("--batch", type=int, default=8, metavar="N", help="rows of a step (default: 8)"),
    Option("--max-length", type=int, default=512, metavar="N", help="tokens of a row (default: 512)"),
    Option("--held-out", type=float, default=0.2, metavar="SHARE", help="of the rows (default: 0.2)"),
    Option(
        "--preset",
        type=Words(("paper", "iclr2026")),
        help="the terms (default: the recommended ones, docs/choose.md)",
    ),
    Several("--terms", metavar="KEY=VALUE", help="instead of the preset's values"),
    Option("--prompts", metavar="FILE", help="questions, one a line, for the report"),
)


def run(args: Values) -> int:
    """Runs the subcommand; returns its exit code."""
    from ..compare.plan import GridSettings, default_steps, grid, rows_digest, terms_from
    from ..samples.jsonl import read_samples
    from ..samples.split import split
    from .report import questions

    _check(args)
    samples = read_samples(args.data)
    _check_packages(samples.task)
    train, held_out = split(samples, args.held_out)
    terms = terms_from(args.preset, args.terms)
    terms.resolved("nlu" if samples.task == "classification" else "nlg")  # says now what is for the other family
    prompts = questions(args.prompts)
    recipe = GridSettings(
        model=args.model,
        steps=args.steps or default_steps(len(train.rows), args.batch),
        rank=args.rank,
        batch=args.batch,
        max_length=args.max_length,
        terms=terms,
        data=rows_digest(train, held_out),
    )
    cells = grid(args.methods, args.rates, args.seeds)
    from ..compare.cells import Data
    from ..samples.models import load_tokenizer

    with quiet(), _without_bars():
        data = Data(train, held_out, load_tokenizer(args.model))
        rows = f"{len(train.rows)} rows to train on, {len(held_out.rows)} held out"
        print(f"{len(cells)} runs of {recipe.steps} steps: {rows}", file=sys.stderr, flush=True)
        records = [_record(cell, recipe, data, args.output, f"[{n}/{len(cells)}]") for n, cell in enumerate(cells, 1)]
        results = _written(records, recipe, (len(train.rows), len(held_out.rows)), args.output)
        print("Drawing the report: models are run over the held-out rows once more", file=sys.stderr, flush=True)
        _report(args, cells, recipe, data, prompts, results)
    return 0


def _check(args: Values) -> None:
    """Refuses numbers that no run can have, before anything is read.

    Raises:
        ValueError: names the argument, its value and what to write.
    """
    for name in ("steps", "rank", "batch", "max_length"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= LARGEST_RANK:
            raise ValueError(f"--{name.replace('_', '-')} {value}: write a whole number from 1 to {LARGEST_RANK}.")
    for rate in args.rates:
        if not 0.0 < rate < 1.0:
            raise ValueError(f"--rates {rate:g}: write learning rates between 0 and 1, such as 1e-4.")
    check_seeds(args.seeds)
    if not 0.0 < args.held_out < 1.0:
        raise ValueError(f"--held-out {args.held_out:g}: write a share between 0 and 1, such as 0.2.")
    check_directory(args.output)
    check_place(args.model, "--model")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps the bars of loading and tokenising from a terminal that shows a line a cell."""
    from datasets.utils import logging as of_datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    of_datasets.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        of_datasets.enable_progress_bar()


def _check_packages(task: str) -> None:
    """Raises an ImportError that names all that is missing, for the runs and for their report, and one extra."""
    from ..report.drawing import DRAWN_WITH

    check_extra("compare", ("datasets", *DRAWN_WITH, "trl" if task == "lm" else "sklearn"), "balora compare")


def _record(cell: Cell, recipe: GridSettings, data: Data, output: str, place: str) -> dict[str, Any]:
    """A cell's record: kept from before, or of a run now."""
    from ..atomic import write_text
    from ..checkpoint.json_file import read_record
    from ..compare.cells import RECORDED, train_cell

    folder = Path(output, "runs", cell.name(recipe))
    kept = folder / "cell.json"
    if kept.is_file():
        record = read_record(kept, RECORDED)
        print(f"{place} {cell}: kept", file=sys.stderr, flush=True)
        return record
    print(f"{place} {cell}", file=sys.stderr, flush=True)
    record = train_cell(cell, recipe, data, str(folder))
    write_text(kept, json.dumps(record, indent=1))
    return record


def _written(records: list[dict[str, Any]], recipe: GridSettings, counts: tuple[int, int], output: str) -> Results:
    """The results, written as JSON and Markdown and printed."""
    import dataclasses

    from ..atomic import write_text
    from ..compare.results import results_of

    results = results_of(records, counts)
    content = {"recipe": dataclasses.asdict(recipe), **results.as_json()}
    write_text(Path(output, "results.json"), json.dumps(content, indent=1))
    write_text(Path(output, "results.md"), results.markdown())
    show_markdown(results.markdown())
    return results


def _report(
    args: Values,
    cells: list[Cell],
    recipe: GridSettings,
    data: Data,
    prompts: tuple[str, ...],
    results: Results,
) -> None:
    """The report of each method at its best rate."""
    from ..report.before_after import AskedOfModels
    from ..report.page import page_of, write_page
    from ..report.runs import read_runs

    best = {(line.method, line.rate) for line in results.best}
    shown = [cell for cell in cells if (cell.method, cell.rate) in best]
    runs = read_runs([str(Path(args.output, "runs", cell.name(recipe))) for cell in shown])
    title = f"{', '.join(line.method for line in results.best)} on {Path(args.data).name}"
    notes = [
        "Each method at its best learning rate.",
        "Intervals over held-out rows stand in results.md; this page's are over seeds.",
        *results.limits,
    ]
    page = page_of(runs, title, AskedOfModels(args.model, data.held_out, prompts), notes)
    print(write_page(page, str(Path(args.output, "report"))))
