"""Say what is installed and what this machine can do, and whether a config can run here.

  balora doctor
  balora doctor --config config.yaml
  balora doctor --config config.yaml --gpu a40 h100
  balora doctor --json

Versions are held against those that were tested; what is missing stands with the command that brings it. With --config
(an Axolotl YAML, or plain keys of the same names) everything in it that cannot run here is listed. With --gpu the GPU
that is named is judged in the place of this machine, and it is said how much memory a training step takes, whether it
fits, and what would save some. Nothing is loaded, written or asked of the network. The exit code is 0 when all is
usable, 1 when something is not; of several GPUs one is enough.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from ._options import Option, Several, Values

if TYPE_CHECKING:
    from ..doctor import Report

HELP = "what is installed, what this machine can do, and whether a config can run here"

PARAMETERS = (
    Option("--config", metavar="FILE", help="a YAML to hold against this machine"),
    Several("--gpu", metavar="NAME", help="say whether the config fits it: a40, h100, ..."),
    Option("--json", is_flag=True, help="print JSON"),
)


def run(args: Values) -> int:
    """Runs the subcommand; returns its exit code."""
    values = None if args.config is None else read(args.config)
    # before anything heavy is imported: packages that look for kernels on the hub, or report that they were imported
    os.environ.update(HF_HUB_OFFLINE="1", AXOLOTL_DO_NOT_TRACK="1")
    from ..doctor import about, gpu_named, look, memory_on
    from ._models import quiet

    gpus = [gpu_named(name) for name in args.gpu]
    if gpus and values is None:
        raise ValueError(f"--gpu {args.gpu[0]} asks whether a run fits, and no run is named: add --config FILE.")
    with quiet():
        machine = look()
        report = about(machine, values, args.config, gpus)
        if gpus and values is not None:
            report.memory = memory_on(values, gpus, axolotl=machine.has("axolotl"))
    print(json.dumps(report.as_json(), indent=2, default=str) if args.json else in_words(report))
    return 0 if report.usable else 1


def read(path: str) -> dict[str, Any]:
    """Reads the YAML's keys.

    Raises:
        ValueError: it is no YAML, or no mapping of keys to values.
    """
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config {path} is no YAML: {error}") from None
        except RecursionError:
            raise ValueError(f"--config {path} is nested too deep: it is no such file.") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} is no mapping of keys to values: write one, such as an Axolotl YAML.")
    return values


def in_words(report: Report) -> str:
    """Returns the report as one screen of text."""
    from ..doctor.report import HERE

    rows = [(line.state, line.subject, line.text, line.remedy) for line in report.lines]
    width = max(len(subject) for _, subject, _, _ in rows)
    text = []
    for state, subject, what, remedy in rows:
        bring = f"  ->  {remedy}" if remedy else ""
        text.append(f"{state:7}  {subject:{width}}  {what}{bring}".rstrip())
    for name, found in report.found.items():
        where = name if name == HERE else f"on {name}"
        if found:
            text.append(f"{report.config} cannot run {where}:")
            text += [f"{'PROBLEM':7}  {problem}" for problem in found]
        else:
            text.append(f"{report.config}: nothing in it that could not run {where}")
    if report.memory is not None:
        text += [f"{'memory':7}  {line}" for line in report.memory.lines]
    text.append("OK" if report.usable else "Not everything is usable: see PROBLEM above.")
    return "\n".join(text)
