"""Forward passes over token documents: sums of log-probability, entropy, calibration and drift a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .calibration import bin_sums
from .documents import TokenDocument
from .sides import Side

_ROWS = 128  # positions at once in float32


@dataclass(frozen=True)
class DocumentSums:
    """Sums over a document's counted tokens, in nats; `bins` (BINS, 3): count, confidence, hits by confidence."""

    count: int
    loss: float
    entropy: float
    bins: np.ndarray

    @property
    def hits(self) -> float:
        """Returns how many counted tokens were the most likely one."""
        return float(self.bins[:, 2].sum())


@dataclass(frozen=True)
class Scored:
    """The sums of every document by side; `drift`: sums of KL(first side || second) a document, where there are two."""

    sides: dict[str, list[DocumentSums]]
    drift: list[float]


def score_documents(sides: Sequence[Side], documents: Sequence[TokenDocument], batch_size: int, what: str) -> Scored:
    """Runs one or two sides over the documents; `what` names the progress bar.

    Raises:
        ValueError: two sides have vocabularies of different sizes.
    """
    found = Scored({side.name: [] for side in sides}, [])
    batches = range(0, len(documents), batch_size)
    for start in tqdm(batches, desc=what, disable=None, leave=False):
        part = documents[start : start + batch_size]
        kept = [_counted_logits(side, part) for side in sides]
        _check_vocabularies([each[0].shape[-1] for each in kept])
        for number, document in enumerate(part):
            targets = torch.tensor([t for t, c in zip(document.ids, document.counted, strict=True) if c])
            logits = [each[number] for each in kept]
            for side, rows in zip(sides, logits, strict=True):
                found.sides[side.name].append(_sums(rows, targets.to(rows.device)))
            if len(sides) == 2:
                found.drift.append(_kl(*logits))
    return found


def _check_vocabularies(sizes: Sequence[int]) -> None:
    if len(set(sizes)) > 1:
        raise ValueError(
            f"the models have {' and '.join(map(str, sizes))} entries in their vocabularies: predictions of different "
            "tokens cannot be compared; leave --drift out."
        )


def _counted_logits(side: Side, part: Sequence[TokenDocument]) -> list[Tensor]:
    """Returns of each document the logits (counted tokens, V) that predict them."""
    width = max(len(document.ids) for document in part)
    ids = torch.zeros(len(part), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(part):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        mask[row, : len(document.ids)] = 1
    with side.active() as model:
        device = model.get_input_embeddings().weight.device
        whole = {} if bool(mask.all()) else {"attention_mask": mask.to(device)}
        with torch.autocast(device.type, enabled=False):
            logits = model(input_ids=ids.to(device), use_cache=False, **whole).logits
    return [
        logits[row, [position - 1 for position, counts in enumerate(document.counted) if counts]]
        for row, document in enumerate(part)
    ]


def _sums(logits: Tensor, targets: Tensor) -> DocumentSums:
    loss = entropy = 0.0
    bins: Any = bin_sums(np.zeros(0), np.zeros(0))
    for rows, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        log = rows.float().log_softmax(dim=-1)
        loss -= float(log.gather(1, wanted[:, None]).double().sum())
        entropy -= float((log.exp() * log).sum(dim=-1).double().sum())
        top, guess = log.max(dim=-1)
        bins = bins + bin_sums(top.double().exp().cpu().numpy(), (guess == wanted).double().cpu().numpy())
    return DocumentSums(len(targets), loss, entropy, bins)


def _kl(teacher: Tensor, student: Tensor) -> float:
    """Returns the sum over positions of KL(teacher || student)."""
    total = 0.0
    for one, two in zip(teacher.split(_ROWS), student.to(teacher.device).split(_ROWS), strict=True):
        log, other = one.float().log_softmax(dim=-1), two.float().log_softmax(dim=-1)
        total += float((log.exp() * (log - other)).sum(dim=-1).double().sum())
    return total
