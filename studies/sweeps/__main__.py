"""The runs of a sweep in one table and one plot: `python -m studies.sweeps RUN [RUN ...] --x rank --output DIR`.

A run is an output directory of Axolotl's --sweep, of the Trainer's hyperparameter_search or of anything else that a
Trainer wrote. --values FILE ({directory: number}, JSON) brings accuracies that were measured elsewhere, and --published
puts the paper's beside them, which are comparable for LLaMA-2-7B trained and measured as docs/paper.md says.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from balora_plugin.report.runs import read_runs

from .published import PUBLISHED
from .together import AXES, draw, points, table


def main(arguments: list[str] | None = None) -> None:
    """Writes `sweep.md` and `sweep.png`, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m studies.sweeps", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", help="output directories")
    parser.add_argument("--x", choices=AXES, default="rank")
    parser.add_argument("--y", default="eval_loss", help="the key that was logged (its last value), or a name")
    parser.add_argument("--values", type=Path, help="JSON: {directory: number}")
    parser.add_argument("--published", choices=sorted(PUBLISHED))
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep"))
    options = parser.parse_args(arguments)
    if options.published and not options.values:
        parser.error("--published needs --values: the paper's accuracies stand beside accuracies, not beside losses")
    values = json.loads(options.values.read_text(encoding="utf-8")) if options.values else None
    published = PUBLISHED.get(options.published)
    found = points(read_runs(options.runs), options.x, options.y, values)
    text = table(found, options.x, options.y, published)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "sweep.md").write_text(text, encoding="utf-8")
    draw(found, options.output / "sweep.png", options.x, options.y, published)
    print(text)


if __name__ == "__main__":
    main()
