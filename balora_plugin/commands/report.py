"""Draw what runs have logged: one HTML file that needs no network, and a PNG of each picture.

  balora report outputs/run
  balora report outputs/lora outputs/ba_lora --output look
  balora report outputs/ba_lora --base MODEL --data held_out.jsonl --prompts questions.txt

A run is an output directory of TRL, transformers or Axolotl, or one of its checkpoints: its log, adapter, ba_lora.json
and ba_lora_cost.json are read where they are. Runs of the same settings are one group, and differences between groups
have intervals over their seeds. With --base models are loaded: spectra of logits and classes of --data, answers to
--prompts (one a line), before and after.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._options import Argument, Option, Values
from ._output import check_directory

if TYPE_CHECKING:
    from ..report.before_after import AskedOfModels

HELP = "draw what runs have logged: one HTML page"

PARAMETERS = (
    Argument("runs", nargs=-1, required=True, metavar="RUN...", help="a run's output directory, or a checkpoint"),
    Option("--output", default="balora-report", metavar="DIR", help="default: balora-report"),
    Option("--title", metavar="TEXT", help="what stands at its top"),
    Option("--base", metavar="MODEL", help="the pre-trained model: look at what models say, too"),
    Option("--data", metavar="FILE", help="JSONL to look at with --base"),
    Option("--prompts", metavar="FILE", help="questions, one a line, to ask with --base"),
)


def run(args: Values) -> int:
    """Runs the subcommand; returns its exit code."""
    from ..report.drawing import check_drawing
    from ..report.page import page_of, write_page
    from ..report.runs import read_runs

    check_drawing()
    check_directory(args.output)
    asked = asked_of(args.base, args.data, args.prompts)
    runs = read_runs(args.runs)
    title = args.title or (f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs")
    if asked is None:
        page = page_of(runs, title)
    else:
        from ._models import quiet

        with quiet():
            page = page_of(runs, title, asked)
    print(write_page(page, args.output))
    return 0


def asked_of(base: str | None, data: str | None, prompts: str | None) -> AskedOfModels | None:
    """Returns what is to be asked of models; None without `base`.

    Raises:
        ValueError: data or prompts without a base, a base with neither, or a file that does not hold them.
    """
    from ..report.before_after import AskedOfModels
    from ..samples.jsonl import read_samples

    if base is None:
        for name, value in (("data", data), ("prompts", prompts)):
            if value is not None:
                raise ValueError(f"--{name} {value} is for models, and none is named: add --base MODEL.")
        return None
    if data is None and prompts is None:
        raise ValueError(f"--base {base} is asked nothing: add --data FILE, --prompts FILE or both.")
    return AskedOfModels(base, None if data is None else read_samples(data), questions(prompts))


def questions(path: str | None) -> tuple[str, ...]:
    """Returns the questions of a file, one a line that is not blank.

    Raises:
        ValueError: it is no file, or holds none.
    """
    if path is None:
        return ()
    if not Path(path).is_file():
        raise ValueError(f"--prompts {path} is no file: write one question a line.")
    found = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    if not found:
        raise ValueError(f"--prompts {path} holds no question: write one a line.")
    return found
