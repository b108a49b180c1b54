"""What would save memory, the cheapest first, and how many bytes: the same counts of a step that is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from .estimate import Held, MemoryEstimate, Workload, gib
from .twin import Twin

_NO_MEMORY = "teacher_interval saves time and no memory: some micro-batch still meets the teacher."


@dataclass(frozen=True)
class Case:
    """A run whose memory is asked for.

    Attributes:
        twin: Its model as shapes.
        work: What a step does.
        held: What is held all along.
        bits: 4 or 8 where the base is quantised in `held`.
        adapts: Whether there is an adapter: without one the base trains, and is not quantised.
    """

    twin: Twin
    work: Workload
    held: Held
    bits: int | None = None
    adapts: bool = True

    def estimate(self) -> MemoryEstimate:
        """Returns what a step takes; runs it on the twin."""
        return self.twin.estimate(self.work, self.held, self.bits)

    def doing(self, **changes: Any) -> Case:
        """Returns the case with another workload."""
        return dataclasses.replace(self, work=dataclasses.replace(self.work, **changes))

    def quantised(self) -> Case:
        """Returns the case on a 4-bit base."""
        weights = self.held.weights - self.twin.packed_away(4)
        return dataclasses.replace(self, held=dataclasses.replace(self.held, weights=weights), bits=4)


class Remedy(NamedTuple):
    """`what` to write, the `price` in words, and the bytes that it alone `saves`."""

    what: str
    price: str
    saves: int

    def __str__(self) -> str:
        return f"{self.what} saves {gib(self.saves)} GiB ({self.price})"


def remedies(case: Case, now: MemoryEstimate) -> list[Remedy]:
    """Returns what would save memory, the cheapest first, each counted by itself; what saves nothing is left out.

    `now`: the case's estimate.
    """
    found = [Remedy(what, price, now.total - changed.estimate().total) for what, price, changed in _changes(case)]
    return [remedy for remedy in found if remedy.saves > 0]


def advice(case: Case, now: MemoryEstimate) -> list[str]:
    """Returns [`remedies`] as lines for people, and what is said of those that save nothing."""
    lines = [f"  {remedy}" for remedy in remedies(case, now)]
    head = ["Each of these saves memory, the cheapest first:"] if lines else ["No setting here saves memory."]
    taught = case.work.terms.lambda_consistency and not case.work.cached
    return [*head, *lines, *([f"  {_NO_MEMORY}"] if taught else [])]


def _changes(case: Case) -> Iterator[tuple[str, str, Case]]:
    work = case.work
    if work.terms.lambda_consistency and not work.cached and work.terms.task == "nlg":
        yield "teacher_cache: <directory>", "disk, and one pass over the data", case.doing(cached=True)
    if work.rows > 1:
        half = work.rows // 2
        yield (
            f"micro_batch_size: {half} (per_device_train_batch_size={half}), gradient_accumulation_steps doubled",
            "smaller products; the singular values are of fewer rows",
            case.doing(rows=half, accumulates=True),
        )
    if not work.checkpointing:
        yield "gradient_checkpointing: true", "a second forward pass", case.doing(checkpointing=True)
    if case.bits is None and case.adapts:
        yield "load_in_4bit: true", "slower products, a rounded base", case.quantised()
