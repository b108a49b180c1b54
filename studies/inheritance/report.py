"""The report: by fault what was put in, what each method leaves of it and at what cost, and what follows by count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common import records as kept
from ..common.bootstrap import REPEATS, Interval, Weights, intervals, mean_of
from ..common.records import Record
from ..common.tables import commands, mean_and_spread, page, shares, table
from .cells import COLOUR, METHODS
from .colours import BALANCED, BIASED, GROUPS, TRAINED_NAMES
from .colours import PROBES as SENTENCES
from .corpus import IMBALANCE, NOISE
from .outcomes import COST, PROBES, Fault, Runs

REFERENCES = ("lora", "pissa")
TITLES = {
    "noise": f"{NOISE:.0%} of the tokens of pre-training replaced (tiny Llama)",
    "imbalance": f"One half of the corpus {IMBALANCE} times rarer (tiny Llama)",
    COLOUR: "A colour that goes with a group of names (larger model)",
}
MODEL_OF = {"noise": "tiny", "imbalance": "tiny", COLOUR: "large"}
CLEAN_OF = {"noise": "clean", "imbalance": "clean", COLOUR: "original"}


def methods_in(records: Sequence[Record]) -> list[str]:
    """The methods that have runs, in their order."""
    return [name for name in METHODS if any(record["setting"]["method"] == name for record in records)]


def fault_of(name: str, records: Sequence[Record]) -> Fault | None:
    """A fault from one model's records; None without runs of it or without the models before fine-tuning."""
    by_fault = {fault: [r for r in records if r["setting"]["fault"] == fault] for fault in (name, CLEAN_OF[name])}
    bases = {fault: [r for r in found if r["setting"]["method"] == "base"] for fault, found in by_fault.items()}
    methods = methods_in(by_fault[name])
    if not methods or not all(bases.values()):
        return None
    tokens = bases[name][0]["tokens"]
    seeds = sorted({r["setting"]["seed"] for r in by_fault[name] if r["setting"]["method"] != "base"})
    base, clean_base = (Runs(bases[fault], ["base"], [0], tokens) for fault in (name, CLEAN_OF[name]))
    clean = clean_base if MODEL_OF[name] == "large" else Runs(by_fault[CLEAN_OF[name]], methods, seeds, tokens)
    return Fault(name, Runs(by_fault[name], methods, seeds, tokens), clean, base, clean_base)


def differences(fault: Fault, methods: Sequence[str], repeats: int) -> dict[tuple[str, str, str], Interval]:
    """By (probe or COST, method, reference) the method's value minus the reference's, on the same items and seeds."""
    probes = PROBES[fault.name]
    keys = [
        (probe.name, method, reference) for probe in (*probes, COST) for reference in REFERENCES for method in methods
    ]

    def statistic(weights: Weights) -> np.ndarray:
        found = [*(fault.left(probe, weights) for probe in probes), fault.cost(weights)]
        rows = []
        for values in found:
            for reference in REFERENCES:
                against = values[list(methods).index(reference)] if reference in methods else np.nan
                rows.append(mean_of(values - against, weights["seeds"]))
        return np.concatenate(rows)

    return dict(zip(keys, intervals(statistic, fault.counts(), repeats), strict=True))


def left_intervals(fault: Fault, repeats: int) -> dict[str, list[Interval]]:
    """By probe what each method leaves, with its interval."""
    probes = PROBES[fault.name]
    found = intervals(
        lambda weights: np.concatenate([mean_of(fault.left(probe, weights), weights["seeds"]) for probe in probes]),
        fault.counts(),
        repeats,
    )
    each = len(found) // len(probes)
    return {probe.name: found[place * each : (place + 1) * each] for place, probe in enumerate(probes)}


def values(fault: Fault, methods: Sequence[str], repeats: int) -> str:
    """A row a method: what is left by probe, in per cent of what was put in, and the task's loss."""
    probes = PROBES[fault.name]
    left = left_intervals(fault, repeats)
    put_in = {probe.name: fault.injected(probe) for probe in probes}
    before = [f"{put_in[probe.name]:+.3f} (100 %)" for probe in probes]
    rows = [["before fine-tuning", "", *before, f"{fault.base.value(COST).item():.3f}"]]
    for place, method in enumerate(methods):
        has = fault.faulty.has[place]
        cells = []
        for probe in probes:
            one, whole = left[probe.name][place], put_in[probe.name]
            cells.append(f"{one.text()} ({100 * one.value / whole:.0f} %)" if whole and one.value == one.value else "-")
        rows.append([method, str(has.sum()), *cells, mean_and_spread(list(fault.cost()[place][has]))])
    return table(["", "seeds", *(f"left: {probe.name}" for probe in probes), COST.name], rows)


def difference_table(found: Mapping[Any, Interval], fault: Fault, methods: Sequence[str], reference: str) -> str:
    """A row a method: how much more of the fault than the reference it leaves (negative: less), and its dearer task."""
    names = [probe.name for probe in (*PROBES[fault.name], COST)]
    rows = [
        [method, *(found[name, method, reference].text() for name in names)]
        for method in methods
        if method != reference and reference in methods
    ]
    return table([f"minus {reference}", *names], rows) if rows else ""


def verdict(found: Mapping[str, Mapping[Any, Interval]], methods: Sequence[str]) -> str:
    """Counted over probes and faults: less of the fault, within chance, more; and the same of the task's loss."""
    rows = []
    for method in methods:
        cells = []
        for of_cost in (False, True):
            for reference in REFERENCES:
                asked = [
                    one
                    for by_key in found.values()
                    for (name, other, against), one in by_key.items()
                    if (name == COST.name) == of_cost and (other, against) == (method, reference)
                    if method != reference and not np.isnan(one.value)
                ]
                below, above = sum(one.high < 0 for one in asked), sum(one.low > 0 for one in asked)
                cells.append(f"{below} / {len(asked) - below - above} / {above}" if asked else "-")
        rows.append([method, *cells])
    heads = [f"{what}, against {reference}" for what in ("fault left", "task loss") for reference in REFERENCES]
    return table(["less / within chance / more", *heads], rows)


def sentences(fault: Fault, methods: Sequence[str], found: Mapping[Any, Interval]) -> str:
    """What the numbers of one fault say: whether it was there, who leaves the least, and whether that is free."""
    said = []
    for probe in PROBES[fault.name]:
        put_in = fault.injected(probe)
        left = np.array([np.nanmean(row) if not np.isnan(row).all() else np.nan for row in fault.left(probe)])
        if put_in <= 0 or np.isnan(left).all():
            said.append(f"- {probe.name}: the fault did not raise it ({put_in:+.3f}), so there is nothing to inherit.")
            continue
        best, worst = methods[int(np.nanargmin(left))], methods[int(np.nanargmax(left))]
        against = [beside(found, probe.name, best, reference) for reference in REFERENCES if reference != best]
        said.append(
            f"- {probe.name}: of {put_in:.3f} put in, `{best}` leaves the least ({100 * np.nanmin(left) / put_in:.0f} "
            f"%), `{worst}` the most ({100 * np.nanmax(left) / put_in:.0f} %).{''.join(against)}"
        )
    return "\n".join(said)


def beside(found: Mapping[Any, Interval], probe: str, method: str, reference: str) -> str:
    """A sentence: whether a method leaves less than a reference beyond chance, and what its task costs."""
    left, cost = (found[name, method, reference] for name in (probe, COST.name))
    if np.isnan(left.value):
        return ""
    less = "less than" if left.high < 0 else "not beyond chance less than"
    dearer = "higher" if cost.low > 0 else "lower" if cost.high < 0 else "the same within chance"
    return f" That is {less} {reference} ({left.text()}), at a task loss that is {dearer} ({cost.text()})."


def words(records: Mapping[str, Sequence[Record]]) -> str:
    """What was run, on what."""
    said = []
    if records["tiny"]:
        shared = records["tiny"][0]["shared"]
        said.append(
            f"Tiny: the quickstart's 1.1M Llama, pre-trained {shared['pretrain_steps']} steps on the docstrings of "
            f"Python {shared['python']}'s standard library, once a fault (all seeds begin with one model a fault); "
            f"halves by top-level package. Fine-tuned {shared['steps']} steps of {shared['batch']} questions with "
            f"answers, as many of each half; rank {shared['rank']} on all linear layers, rates of the quickstart, not "
            f"tuned. Probes: {shared['probes']} held-out docstrings a half and {shared['probes']} held-out questions, "
            f"at most {shared['longest']} tokens. Unlikely: below 1 / V by the cleanly pre-trained model. What is left "
            "of the fault is the probe minus the same method's and seed's that began with the clean model."
        )
    if records["large"]:
        shared = records["large"][0]["shared"]
        said.append(
            f"Larger: {shared['model']}, made biased by {shared['biased_steps']} steps of {shared['biased_batch']} "
            f"sentences (LoRA at {shared['biased_rate']:g}, merged) of {len(BIASED)} templates, {TRAINED_NAMES} names "
            f"a group, one colour a group; then {shared['large_steps']} steps of {shared['large_batch']} rows, three "
            f"problems of GSM8K and a sentence in turn ({len(BALANCED)} other templates, the same names, both colours "
            f"alike), at most {shared['large_longest']} tokens, bfloat16. Probe: the log-odds of the two colours after "
            f"{len(SENTENCES)} other beginnings, on {len(GROUPS[0]) - TRAINED_NAMES} held-out names a group, mean of "
            "the first group minus the second's; left: minus the original model's. Cost: loss on "
            f"{shared['test']} of GSM8K's test problems."
        )
    return "\n\n".join(said)


def report(records: Mapping[str, Sequence[Record]], command: str, repeats: int) -> str:
    """The whole page. `records`: of the `tiny` and of the `large` model."""
    every = [record for found in records.values() for record in found]
    trained = [record for record in every if record["setting"]["method"] != "base"]
    parts, found = [], {}
    for name, title in TITLES.items():
        fault = fault_of(name, records[MODEL_OF[name]])
        if fault is None:
            continue
        methods = methods_in([r for r in records[MODEL_OF[name]] if r["setting"]["fault"] == name])
        found[name] = differences(fault, methods, repeats)
        parts += [f"## {title}", sentences(fault, methods, found[name]), values(fault, methods, repeats)]
        parts += [difference_table(found[name], fault, methods, reference) for reference in REFERENCES]
    return page(
        "# Inheritance under control",
        f"Written by `{command}`.",
        words(records),
        f"{len(trained)} runs, {sum(record['seconds'] for record in every) / 60:.0f} minutes of one thread on a "
        f"machine with other work; {'; '.join(sorted({record['machine'] for record in every}))}.",
        "## Does a term leave less of a fault that pre-training has put in?",
        "Counted over the faults' probes: how often the 95 % interval of the difference (paired bootstrap over items "
        f"and seeds, {repeats} draws) lies below 0, holds it, lies above. Of so many, one in twenty by chance.",
        verdict(found, methods_in(trained)),
        *parts,
        "## How strong the terms were",
        shares(trained, METHODS),
        "## Repeating a cell",
        "A cell whose file exists is not run again: remove it, or write to another `--output`. A cell is named "
        "FAULT-METHOD-sSEED:",
        commands(trained[:1], command),
    )


def write_report(folder: Path, quick: bool) -> Path | None:
    """Writes the report of the records that there are; None without any run."""
    found = {model: kept.read(folder / "runs" / model) for model in ("tiny", "large")}
    if not any(record["setting"]["method"] != "base" for records in found.values() for record in records):
        return None
    command = "python -m studies.inheritance"
    if found["large"]:
        command += f' --model MODEL --data DATA --model-name "{found["large"][0]["shared"]["model"]}"'
    path = folder / "report.md"
    path.write_text(report(found, command + (" --quick" if quick else ""), REPEATS), encoding="utf-8")
    return path
