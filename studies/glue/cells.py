"""What is trained: methods, settings of the training set, tasks, and the order in which their cells run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ..common.records import Cell
from ..common.terms import NO_TERMS

SETTINGS = ("clean", "noise", "imbalance")
TASKS = ("sst2", "cola", "rte")
# where this encoder says the commonest class for hundreds of steps: the main methods on the clean set
MAIN = ("lora", "pissa", "ba-paper", "ba-iclr2026", "full")
FEW = {"cola": (("clean",), MAIN), "rte": (("clean",), MAIN)}
SHARES = {"consistency": 0.3, "diversity": 0.05, "svd": 0.05}
RATES = (5e-4, 2e-3, 5e-3)
RATES_OF = {"full": (5e-5, 2e-4, 5e-4)}  # of the methods with another grid
TUNING_SEED = 0  # chooses the rates, is not reported


def alone(term: str) -> dict[str, Any]:
    """One term at `iclr2026`'s weight, the other two at 0."""
    return {"preset": "iclr2026", **{name: 0.0 for name in NO_TERMS if name != f"lambda_{term}"}}


@dataclass(frozen=True)
class Method:
    """`start`: PEFT's init_lora_weights, None for full fine-tuning; `terms`: RegularizerConfig's fields.

    `rate_of`: the method whose tuned rate it takes. All terms train at PiSSA's, so that they alone differ.
    """

    start: bool | str | None
    terms: Mapping[str, Any] = field(default_factory=lambda: NO_TERMS)
    rate_of: str = "pissa"


METHODS: dict[str, Method] = {
    "lora": Method(True, rate_of="lora"),
    "pissa": Method("pissa"),
    "ba-paper": Method("pissa", {"preset": "paper"}),
    "ba-iclr2026": Method("pissa", {"preset": "iclr2026"}),
    "full": Method(None, rate_of="full"),
    "balance": Method("pissa", {"preset": "iclr2026", "balance": SHARES, "svd_input": "features"}),
    "consistency": Method("pissa", alone("consistency")),
    "diversity": Method("pissa", alone("diversity")),
    "svd": Method("pissa", alone("svd")),
    "svd-features": Method("pissa", {"preset": "iclr2026", "svd_input": "features"}),
    "diversity-features": Method("pissa", {"preset": "iclr2026", "diversity_input": "features"}),
}
TUNED = tuple(name for name, method in METHODS.items() if method.rate_of == name)


def tuning_cells(tasks: Sequence[str]) -> list[Cell]:
    """Each tuned method at each rate of its grid, on the clean training set of every task."""
    return [
        Cell(
            f"tuning-{task}-{method}-{rate:g}",
            {"task": task, "setting": "clean", "method": method, "seed": TUNING_SEED, "rate": rate},
        )
        for task in tasks
        for method in TUNED
        for rate in RATES_OF.get(method, RATES)
    ]


def runs_in(task: str, setting: str, method: str) -> bool:
    """Whether a task's cells are of this setting and method."""
    settings, methods = FEW.get(task, (SETTINGS, tuple(METHODS)))
    return setting in settings and method in methods


def study_cells(seeds: Sequence[int], tasks: Sequence[str], methods: Sequence[str]) -> Iterator[Cell]:
    """Seed by seed, setting by setting: a study that is stopped is a comparison of all methods."""
    for seed, setting, task, method in product(seeds, SETTINGS, tasks, methods):
        if runs_in(task, setting, method):
            values = {"task": task, "setting": setting, "method": method, "seed": seed}
            yield Cell(f"{setting}-{task}-{method}-s{seed}", values)
