"""Which anchors a step meets: a function of the step alone, so that a resumed run goes on where it was."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache


@dataclass(frozen=True)
class Stream:
    """An endless stream of documents, passed over in another order each time.

    Args:
        documents: How many there are, at least one.
        per_step: Anchor rows of an optimizer step, over all its micro-batches and processes; less than 1: a row in
            some steps.
        processes: Among which the rows of a step are dealt out.
        seed: Of the orders.
    """

    documents: int
    per_step: Fraction
    processes: int = 1
    seed: int = 0

    @property
    def weight(self) -> float:
        """The factor of a step that has anchors, so that its mean over all steps is 1."""
        return float(1 / min(self.per_step, Fraction(1)))

    def of_step(self, step: int) -> list[int]:
        """Returns the documents of a step of the global batch."""
        return [self._document(place) for place in self._places(step)]

    def of_process(self, step: int, rank: int) -> list[int]:
        """Returns this process's part of them; the first of a step goes round among the processes."""
        places = enumerate(self._places(step))
        return [self._document(place) for i, place in places if (i + step) % self.processes == rank]

    def of_micro_batch(self, step: int, rank: int, micro: int, count: int) -> list[int]:
        """Returns the part of that for micro-batch `micro` of the `count` that the step has on each process."""
        own = self.of_process(step, rank)
        return [document for i, document in enumerate(own) if i * count // len(own) == micro]

    def met_by(self, rank: int, steps: int) -> Iterator[tuple[int, int]]:
        """Gives (step, document) for the first so many steps of a process, in their order."""
        for step in range(steps):
            for document in self.of_process(step, rank):
                yield step, document

    def _places(self, step: int) -> range:
        return range(math.floor(step * self.per_step), math.floor((step + 1) * self.per_step))

    def _document(self, place: int) -> int:
        passes, at = divmod(place, self.documents)
        return _order(self.documents, self.seed, passes)[at]


@lru_cache(maxsize=8)
def _order(documents: int, seed: int, passes: int) -> list[int]:
    return shuffled(documents, f"{seed}:{passes}")


def shuffled(count: int, seed: str) -> list[int]:
    """Returns 0 to count - 1 in an order drawn by `seed`."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
