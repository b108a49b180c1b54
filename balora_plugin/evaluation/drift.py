"""How far an adapter moved a model on a text: drift, loss, entropy, accuracy and calibration of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .calibration import ECE
from .documents import Reading
from .figures import RATIO, Figure
from .scoring import DocumentSums, Scored, score_documents
from .sides import Side


def drift_figures(path: str, reading: Reading, sides: Sequence[Side], batch_size: int) -> list[Figure]:
    """Measures the sides on the documents of a file; all figures are means over counted tokens, losses in nats."""
    name = f"drift:{Path(path).name}"
    return figures_of(name, score_documents(sides, reading.documents, batch_size, name))


def figures_of(name: str, scored: Scored) -> list[Figure]:
    """Returns the figures of what was summed."""

    def ratio(what: str, of: str, better: bool | None) -> Figure:
        values = {
            side: [(float(getattr(each, of)), each.count) for each in sums] for side, sums in scored.sides.items()
        }
        return Figure(name, what, values, RATIO, better)

    figures = []
    if scored.drift:
        adapted: list[DocumentSums] = list(scored.sides.values())[1]
        pairs = [(kl, each.count) for kl, each in zip(scored.drift, adapted, strict=True)]
        figures.append(Figure(name, "kl_from_base", {list(scored.sides)[1]: pairs}, RATIO, better=False))
    figures += [ratio("loss", "loss", False), ratio("entropy", "entropy", None), ratio("accuracy", "hits", True)]
    bins = {side: [each.bins for each in sums] for side, sums in scored.sides.items()}
    return [*figures, Figure(name, "ece", bins, ECE, better=False)]
