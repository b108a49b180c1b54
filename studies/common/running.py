"""What every study's command does before it runs: quiet hosts, one thread unless asked, the options they share."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from .records import Cell


def prepare() -> None:
    """Quietens the hosts; called before they are imported. OMP_NUM_THREADS decides the threads, by default one."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    from ..quickstart.__main__ import silence_progress_bars

    silence_progress_bars()


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """The options of every study."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    made.add_argument("--output", type=Path, help="folder of runs/*.json and report.md; default: the study's own")
    made.add_argument("--seeds", type=int, nargs="+", help="seeds to run")
    made.add_argument("--cells", nargs="+", metavar="PATTERN", default=["*"], help="run only cells of these names")
    made.add_argument("--quick", action="store_true", help="a few minutes: small sizes, few cells, outputs/ as folder")
    made.add_argument("--report", action="store_true", help="run nothing, write the report of what there is")
    return made


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose names fit one of the patterns."""
    return [cell for cell in cells if any(fnmatch.fnmatch(cell.name, pattern) for pattern in patterns)]


def folder_of(options: argparse.Namespace, study: str) -> Path:
    """Where records and report go."""
    if options.output is not None:
        return Path(options.output)
    return Path("outputs") / f"{study}-quick" if options.quick else Path(__file__).parents[1] / study


def free() -> None:
    """Lets go of the last run's model, which its trainer holds in a circle."""
    gc.collect()


def run_study(
    options: argparse.Namespace,
    study: str,
    run_all: Callable[[argparse.Namespace, Path], None],
    write_report: Callable[[Path, bool], Path | None],
) -> int:
    """Runs what is missing of a study, unless its report alone is asked for; then writes the report."""
    folder = folder_of(options, study)
    if not options.report:
        prepare()
        run_all(options, folder)
    written = write_report(folder, options.quick)
    print(f"{written}" if written else f"{folder}/runs has no runs to report")
    return 0
