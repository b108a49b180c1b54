"""Runs the study, or what is left of it: `python -m studies.encoder --output DIR` (up to an hour on one core).

Every run is kept in `DIR/study.json` as soon as it has finished and is not repeated; `DIR/study.md` has the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from ..quickstart.__main__ import silence_progress_bars

TUNING_SEED = 0  # chooses the learning rates, is not reported
RATES = (1e-3, 2e-3, 5e-3)


class Kept:
    """The finished runs in a file, with what all of them share."""

    def __init__(self, path: Path, shared: dict[str, Any]) -> None:
        self.path, self.shared, self.records = path, shared, []
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["shared"] != shared:
                raise SystemExit(
                    f"{path} holds runs of other sizes ({stored['shared']}, now {shared}): give another --output"
                )
            self.records = stored["runs"]

    def find(self, key: dict[str, Any]) -> dict[str, float] | None:
        """What the run with this setting, method, seed and rate found."""
        matches = (record["found"] for record in self.records if all(record[k] == v for k, v in key.items()))
        return next(matches, None)

    def add(self, key: dict[str, Any], found: dict[str, float]) -> None:
        """Keeps a run; the file is written whole or not at all."""
        self.records.append({**key, "found": found})
        lines = ",\n".join(json.dumps(record) for record in self.records)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(f'{{"shared": {json.dumps(self.shared)},\n"runs": [\n{lines}\n]}}\n', encoding="utf-8")
        temporary.replace(self.path)


def best_rates(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By method the rate with the highest accuracy on the tuning seed's held-out bodies; of equals the lowest."""
    found: dict[str, dict[float, float]] = {}
    for record in records:
        if record["seed"] == TUNING_SEED:
            found.setdefault(record["method"], {})[record["rate"]] = record["found"]["accuracy"]
    return {method: max(sorted(rates), key=lambda rate: rates[rate]) for method, rates in found.items()}


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Any]:
    """The options, and the sizes among them."""
    from .data import SETTINGS
    from .train import Sizes

    parser = argparse.ArgumentParser(prog="python -m studies.encoder", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/study"))
    parser.add_argument("--model", type=Path, help="directory of another BERT-like encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help=f"{TUNING_SEED} is taken")
    parser.add_argument(
        "--at-pissas-rate",
        nargs="*",
        choices=SETTINGS,
        default=list(SETTINGS),
        help="settings in which BA-LoRA, where its own learning rate is another one, also runs at PiSSA's",
    )
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    for name, value in asdict(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args(arguments)
    if TUNING_SEED in options.seeds:
        parser.error(f"--seeds {TUNING_SEED} chooses the learning rates: give others")
    return options, Sizes(**{name: getattr(options, name) for name in asdict(Sizes())})


def titles(sizes: Any) -> dict[str, str]:
    """Heading of each setting's tables."""
    from .data import IMBALANCE, MINORITIES, NOISE

    n = sizes.per_class
    return {
        "clean": f"Clean: {n} training texts a class",
        "noise": f"Noise: the same, {NOISE:.0%} of the training labels wrong",
        "imbalance": f"Imbalance: {MINORITIES} classes with {max(1, n // IMBALANCE)} training texts, the others {n}",
    }


def heading(sizes: Any, shared: dict[str, Any], command: str) -> str:
    """What was run, on what."""
    import torch

    from benchmarks.measuring import machine

    rates = ", ".join(f"{rate:g}" for rate in shared["rates"])
    return (
        "# Which module family does a docstring come from?\n\n"
        f"`{command}` on {machine(torch.device('cpu'))}\n\n"
        f"{shared['model']}; ten classes, {shared['samples']} docstrings of {shared['modules']} modules, split by "
        f"module anew for every seed; at most {sizes.per_class} bodies a class to train on, {sizes.test_per_class} "
        f"docstrings a class to test on (body, and under shift the summary line); texts cut at {sizes.max_length} "
        f"tokens; {sizes.steps} steps of {sizes.batch} texts, rank {sizes.rank} on all linear layers, "
        f"dropout {sizes.dropout:g}, linear schedule. Learning rates from {rates}, chosen per method on "
        f"seed {TUNING_SEED}, which is not reported. Mean ± standard deviation over seeds, then the differences to "
        "PiSSA paired by seed (* where a 95 % t-interval leaves out 0: of so many cells one in twenty by chance).\n\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing, then writes the tables."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    silence_progress_bars()
    import gc
    import sysconfig

    from ..common.encoder import PACKAGE, encoder_path
    from ..quickstart.corpus import collect_docstrings, source_files
    from .data import SETTINGS, build, samples
    from .table import REFERENCE, at_one_rate, markdown
    from .train import METHODS, run

    options, sizes = parse(arguments)
    path = options.model or encoder_path()
    modules = [name for name, _ in source_files(Path(sysconfig.get_paths()["stdlib"]))]
    found = samples(collect_docstrings(), modules)
    shared = {
        "model": options.model.name if options.model else PACKAGE,
        "python": sys.version.split()[0],
        "samples": len(found),
        "modules": len({sample.module for sample in found}),
        "rates": options.rates,
        **asdict(sizes),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    kept = Kept(options.output / "study.json", shared)
    gc.freeze()  # a trainer collects garbage when it starts: a second over what the libraries hold

    def once(setting: str, method: str, seed: int, rate: float) -> None:
        key = {"setting": setting, "method": method, "seed": seed, "rate": rate}
        if kept.find(key) is None:
            study = build(found, setting, seed, sizes.per_class, sizes.test_per_class)
            kept.add(key, run(path, method, study, seed, rate, sizes))
        result = kept.find(key) or {}
        print(
            f"{setting:9s} seed {seed} {method:17s} rate {rate:g}: accuracy {result['accuracy']:.3f}, under shift "
            f"{result['shift_accuracy']:.3f}, {result['seconds']} s",
            flush=True,
        )

    for method, rate in product(METHODS, options.rates):
        once("clean", method, TUNING_SEED, rate)
    rates = best_rates(kept.records)
    # seed by seed, so that what an interrupted study has is complete pairs
    for seed, setting, method in product(options.seeds, SETTINGS, METHODS):
        once(setting, method, seed, rates[method])
    moved = [method for method in METHODS if method.startswith("BA-LoRA") and rates[method] != rates[REFERENCE]]
    for setting, seed, method in product(options.at_pissas_rate, options.seeds, moved):
        once(setting, method, seed, rates[REFERENCE])
    reported = [r for r in kept.records if r["seed"] in options.seeds]
    own = [r for r in reported if r["rate"] == rates[r["method"]]]
    command = " ".join(["python -m studies.encoder", *(sys.argv[1:] if arguments is None else arguments)])
    text = heading(sizes, shared, command) + markdown(own, rates, titles(sizes))
    if below := at_one_rate(reported, rates, titles(sizes)):
        text += f"\n{below}"
    (options.output / "study.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.output / 'study.md'} and {kept.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
