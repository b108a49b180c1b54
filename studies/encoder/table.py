"""Tables of the study: mean and standard deviation over seeds, and differences to PiSSA paired by seed."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.measuring import table

REFERENCE = "PiSSA"
METRICS = {  # metric: (its name in the tables, factor, decimals)
    "accuracy": ("accuracy %", 100, 1),
    "macro_f1": ("macro-F1 %", 100, 1),
    "minority_recall": ("minority recall %", 100, 1),
    "shift_accuracy": ("accuracy under shift %", 100, 1),
    "shift_macro_f1": ("macro-F1 under shift %", 100, 1),
    "drift": ("drift (KL)", 1, 3),
    "feature_drift": ("feature drift", 1, 3),
    "effective_rank": ("effective rank", 1, 1),
}
# two-sided 95 % quantiles of Student's t by the number of pairs
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

Runs = Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]  # setting, method, seed, metric


def arranged(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, Mapping[str, float]]]]:
    """Records of the reported seeds by setting, method and seed."""
    runs: dict[str, dict[str, dict[int, Mapping[str, float]]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        runs[record["setting"]][record["method"]][record["seed"]] = record["found"]
    return {setting: dict(methods) for setting, methods in runs.items()}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation with n - 1; None of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(runs: Runs, setting: str, method: str, metric: str) -> list[float]:
    """method - PiSSA for every seed that both have, in order of the seeds."""
    one, other = runs[setting].get(method, {}), runs[setting].get(REFERENCE, {})
    return [one[seed][metric] - other[seed][metric] for seed in sorted(one.keys() & other.keys())]


def beyond_chance(differences: Sequence[float]) -> bool:
    """Whether the 95 % interval of the mean (Student's t) leaves 0 out; False below two and above ten pairs."""
    mean, deviation = spread(differences)
    if deviation is None or len(differences) not in STUDENT:
        return False
    return abs(mean) > STUDENT[len(differences)] * deviation / len(differences) ** 0.5


def setting_table(runs: Runs, setting: str) -> str:
    """Mean ± standard deviation over seeds, a row a method."""
    rows = []
    for method, seeds in runs[setting].items():
        cells = []
        for metric, (_, factor, decimals) in METRICS.items():
            mean, deviation = spread([factor * found[metric] for found in seeds.values()])
            cells.append(f"{mean:.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}"))
        rows.append([method, *cells])
    return table(["", *(name for name, _, _ in METRICS.values())], rows)


def paired_table(runs: Runs, setting: str) -> str:
    """Mean ± standard deviation of the differences to PiSSA by seed, a row a method; * where `beyond_chance`."""
    rows = []
    for method in runs[setting]:
        if method == REFERENCE or not paired(runs, setting, method, "accuracy"):
            continue
        cells = []
        for metric, (_, factor, decimals) in METRICS.items():
            differences = [factor * value for value in paired(runs, setting, method, metric)]
            mean, deviation = spread(differences)
            cell = f"{mean:+.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")
            cells.append(cell + (" *" if beyond_chance(differences) else ""))
        rows.append([f"{method} minus {REFERENCE}", *cells])
    return table(["", *(name for name, _, _ in METRICS.values())], rows) if rows else ""


def strongest_term(runs: Runs, setting: str, method: str) -> tuple[str, float]:
    """(term, its largest gradient relative to the task's, mean over seeds) of the term where that is largest."""
    seeds = runs[setting][method].values()
    names = [key.removeprefix("share_") for key in next(iter(seeds)) if key.startswith("share_")]
    means = {name: statistics.fmean(found[f"share_{name}"] for found in seeds) for name in names}
    return max(means.items(), key=lambda item: item[1])


def markdown(records: Sequence[Mapping[str, Any]], rates: Mapping[str, float], titles: Mapping[str, str]) -> str:
    """Both tables of every setting that has runs. `rates`: learning rate by method; `titles`: heading by setting."""
    runs = arranged(records)
    parts = []
    for setting, title in titles.items():
        if setting in runs:
            seeds = sorted({seed for found in runs[setting].values() for seed in found})
            parts += [f"## {title}", f"Seeds {', '.join(map(str, seeds))}.", setting_table(runs, setting)]
            if below := paired_table(runs, setting):
                parts += [below]
            shares = ", ".join(
                f"{method} {value:.2g} ({name})"
                for method, (name, value) in ((m, strongest_term(runs, setting, m)) for m in runs[setting])
                if value
            )
            if shares:
                parts += [f"Strongest term's gradient beside the task's, largest of those logged: {shares}."]
    chosen = ", ".join(f"{method} {rate:g}" for method, rate in rates.items())
    return "\n\n".join([*parts, f"Learning rates: {chosen}."]) + "\n"


def at_one_rate(records: Sequence[Mapping[str, Any]], rates: Mapping[str, float], titles: Mapping[str, str]) -> str:
    """Differences to PiSSA of the methods whose own rate is another one, all at PiSSA's; empty without such runs."""
    rate = rates[REFERENCE]
    moved = {method for method, own in rates.items() if own != rate}
    runs = arranged(r for r in records if r["rate"] == rate and r["method"] in {REFERENCE, *moved})
    parts = [f"## At PiSSA's learning rate, {rate:g}"]
    for setting, title in titles.items():
        if len(runs.get(setting, {})) > 1 and (below := paired_table(runs, setting)):
            parts += [f"{title}.", below]
    return "\n\n".join(parts) + "\n" if len(parts) > 1 else ""
