"""The report: what was asked, what was found, the tables, the paper's figures beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common import records as kept
from ..common.bootstrap import REPEATS, Interval
from ..common.records import Record
from ..common.tables import commands, mean_and_spread, page, shares, table
from .cells import METHODS, RATES, RATES_OF, SETTINGS, SHARES, TASKS, TUNED
from .data import IMBALANCE, NOISE
from .differences import ALL, REFERENCES, Key, differences
from .outcomes import METRICS, MINORITY, SCORE, Metric, Outcomes
from .published import beside

TITLES = {
    "clean": "Clean",
    "noise": f"{NOISE:.0%} of the training labels wrong",
    "imbalance": f"One class at 1 / {IMBALANCE} of the other",
}


class Study:
    """All records of the study, arranged by setting and task."""

    def __init__(self, runs: Sequence[Record], truth: Record, repeats: int) -> None:
        self.runs = runs
        self.seeds = sorted({run["setting"]["seed"] for run in runs})
        self.methods = [name for name in METHODS if any(run["setting"]["method"] == name for run in runs)]
        self.tasks: dict[str, dict[str, Outcomes]] = {}
        for setting in SETTINGS:
            for task in TASKS:
                of = [r for r in runs if (r["setting"]["setting"], r["setting"]["task"]) == (setting, task)]
                if of:
                    outcomes = Outcomes(of, self.methods, self.seeds, truth["tasks"][task])
                    self.tasks.setdefault(setting, {})[task] = outcomes
        self.found = {
            setting: differences(setting, tasks, self.methods, len(self.seeds), repeats)
            for setting, tasks in self.tasks.items()
        }

    def of(self, metric: Metric, method: str, reference: str) -> list[Interval]:
        """The differences of a method in all settings and tasks, averages left out."""
        return [
            value
            for found in self.found.values()
            for key, value in found.items()
            if (key.metric, key.method, key.reference) == (metric, method, reference) and key.task != ALL
            if not np.isnan(value.value)
        ]


def counted(found: Sequence[Interval]) -> tuple[int, int, int]:
    """How many lie above 0, within chance of it, and below."""
    above, below = sum(one.low > 0 for one in found), sum(one.high < 0 for one in found)
    return above, len(found) - above - below, below


def verdict(study: Study) -> str:
    """Methods by how often they beat each reference: counted, not judged."""
    rows = []
    for method in study.methods:
        cells = []
        for metric in (SCORE, MINORITY):
            for reference in REFERENCES:
                found = [] if method == reference else study.of(metric, method, reference)
                cells.append(" / ".join(map(str, counted(found))) if found else "-")
        rows.append([method, *cells])
    heads = [f"{metric.name}, against {reference}" for metric in (SCORE, MINORITY) for reference in REFERENCES]
    return table(["higher / within chance / lower", *heads], rows)


def sentences(study: Study) -> str:
    """What the counts say of the presets, and where no method has learned the task."""
    said = []
    for method in ("ba-paper", "ba-iclr2026"):
        for reference in REFERENCES:
            found = study.of(SCORE, method, reference)
            above, within, below = counted(found)
            if found:
                said.append(
                    f"- `{method}` against {reference}: GLUE's score is higher in {above} of {len(found)} sets, lower "
                    f"in {below}, within chance in {within}."
                )
    for setting, tasks in study.tasks.items():
        for task, outcomes in tasks.items():
            best = np.nanmax(np.nanmean(outcomes.value(SCORE)[outcomes.has.any(axis=1)], axis=1))
            if best <= outcomes.of_majority() + 1:
                said.append(
                    f"- {task}, {setting}: no method's mean is a point above always saying the commonest class "
                    f"({outcomes.of_majority():.1f}): in so few steps nobody has learned it, and its scores compare "
                    "nothing. Its AUC may."
                )
    return "\n".join(said)


def values(study: Study, setting: str) -> str:
    """A row a task and method: mean ± deviation over seeds."""
    rows = []
    for task, outcomes in study.tasks[setting].items():
        rows.append(
            [f"{task}: commonest class", "", f"{outcomes.of_majority():.1f}", *[""] * (len(METRICS[setting]) - 1)]
        )
        found = {metric: outcomes.value(metric) for metric in METRICS[setting]}
        for place, method in enumerate(study.methods):
            has = outcomes.has[place]
            if has.any():
                cells = [mean_and_spread(list(found[m][place][has]), m.decimals) for m in METRICS[setting]]
                rows.append([f"{task}: {method}", str(has.sum()), *cells])
    return table(["", "seeds", *(metric.name for metric in METRICS[setting])], rows)


def differences_table(study: Study, setting: str, reference: str) -> str:
    """A row a task and method: its difference to the reference."""
    rows = []
    for task in (*study.tasks[setting], ALL):
        for method in study.methods:
            found = [study.found[setting][Key(task, metric, method, reference)] for metric in METRICS[setting]]
            if method != reference and not all(np.isnan(one.value) for one in found):
                cells = [one.text(m.decimals) for one, m in zip(found, METRICS[setting], strict=True)]
                rows.append([f"{task}: {method}", *cells])
    return table([f"minus {reference}", *(metric.name for metric in METRICS[setting])], rows) if rows else ""


def rates(runs: Sequence[Record], tuning: Sequence[Record]) -> str:
    """The grid's losses, the chosen rate in bold."""
    losses = {(r["setting"]["task"], r["setting"]["method"], r["setting"]["rate"]): r["loss"] for r in tuning}
    chosen = {(r["setting"]["task"], METHODS[r["setting"]["method"]].rate_of): r["rate"] for r in runs}
    rows = []
    for task in TASKS:
        for method in TUNED:
            grid = [rate for rate in RATES_OF.get(method, RATES) if (task, method, rate) in losses]
            cells = [
                f"{'**' if chosen.get((task, method)) == rate else ''}{rate:g}: {losses[task, method, rate]:.3f}"
                f"{'**' if chosen.get((task, method)) == rate else ''}"
                for rate in grid
            ]
            if cells:
                rows.append([task, method, ", ".join(cells)])
    return table(["task", "method", "rate: loss on the held-out rows (chosen)"], rows)


def words(shared: Mapping[str, Any], truth: Record) -> str:
    """What was run, on what."""
    steps = ", ".join(
        f"{task} {shared['steps'][task]} (of {one['train']} rows, tested on {len(one['gold'])})"
        for task, one in truth["tasks"].items()
    )
    held = ", ".join(f"{term} {share:g}" for term, share in SHARES.items())
    return (
        f"{shared['model']} with a new head, no dropout; steps of {shared['batch']} texts of at most "
        f"{shared['length']} tokens: {steps}; rank {shared['rank']} on all linear layers, alpha = rank, AdamW, linear "
        f"schedule, computed in {shared['trained_in']} autocast. Single terms have `iclr2026`'s weight; "
        "`svd-features` and `diversity-features` are `iclr2026` with that term's input; `balance` holds the shares "
        f"{held}, svd on features. GLUE's score: accuracy, for CoLA 100 x Matthews. AUC: how often a row of class 1 "
        "gets more of class 1's logit than one of class 0. Drift: KL(initial ‖ trained) of the predictions, feature "
        "drift: ‖f - f0‖ / ‖f0‖ of [CLS]; initial is the pre-trained encoder under the head that the run began with. "
        "CoLA and RTE have the clean setting and the five main methods alone: nobody learns them in a time like this."
    )


def report(runs: Sequence[Record], tuning: Sequence[Record], truth: Record, command: str, repeats: int) -> str:
    """The whole page."""
    study = Study(runs, truth, repeats)
    minutes = sum(record["seconds"] for record in (*runs, *tuning)) / 60
    parts = []
    for setting in study.tasks:
        parts += [f"## {TITLES[setting]}", values(study, setting)]
        parts += [differences_table(study, setting, reference) for reference in REFERENCES]
    return page(
        "# The paper's GLUE protocol on a real encoder",
        f"Written by `{command}`. {words(truth['shared'], truth)}",
        f"{len(runs)} runs and {len(tuning)} to tune, {minutes:.0f} minutes of one thread on a machine with other "
        f"work; {'; '.join(sorted({record['machine'] for record in runs}))}.",
        "## Does a term buy a better score than LoRA or PiSSA?",
        "Counted over settings and tasks: in how many the 95 % interval of the difference (paired bootstrap over test "
        f"rows and seeds, {repeats} draws) lies above 0, holds it, lies below. Of so many, one in twenty by chance.",
        verdict(study),
        sentences(study),
        "## Beside the paper",
        "Here: the mean over the tasks that both methods have, in points. Neither models nor data nor sizes are the "
        "paper's: what can be compared is the sign of a difference.",
        beside(study.found),
        *parts,
        "## How strong the terms were",
        shares(runs, METHODS),
        "## Learning rates",
        "Tuned on rows of the training set that nobody trains on, on a seed that is not reported; every method with "
        "terms has PiSSA's rate, so that the terms alone differ.",
        rates(runs, tuning),
        "## Repeating a cell",
        "A cell whose file exists is not run again: remove it, or write to another `--output`. A cell is named "
        "SETTING-TASK-METHOD-sSEED:",
        commands(runs[:1], command),
    )


def write_report(folder: Path, quick: bool) -> Path | None:
    """Writes the report of the records that there are; None without any."""
    found = kept.read(folder / "runs")
    truth = next((record for record in found if record["cell"] == "data"), None)
    tuning = [record for record in found if "rate" in record["setting"]]
    runs = [record for record in found if "logits" in record]
    if truth is None or not runs:
        return None
    named = f' --model-name "{truth["shared"]["model"]}"'
    command = "python -m studies.glue --model MODEL --data DATA" + named + (" --quick" if quick else "")
    path = folder / "report.md"
    path.write_text(report(runs, tuning, truth, command, REPEATS), encoding="utf-8")
    return path
