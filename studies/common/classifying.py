"""What the studies of classifiers measure on held-out texts: outputs and features by text, recall and F1 by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """Outputs on the held-out texts: logits (N, classes), final hidden states of [CLS] (N, d), labels (N,)."""

    logits: Tensor
    features: Tensor
    labels: Tensor


@torch.no_grad()
def look(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch: int = 32) -> Seen:
    """What a classifier makes of the rows, in evaluation mode, in the rows' order."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))  # little padding
    logits, features = [], []
    for start in range(0, len(order), batch):
        inputs = [{k: v for k, v in rows[i].items() if k != "labels"} for i in order[start : start + batch]]
        out = model(**tokenizer.pad(inputs, return_tensors="pt").to(model.device), output_hidden_states=True)
        logits.append(out.logits.float().cpu())
        features.append(out.hidden_states[-1][:, 0].float().cpu())
    back = torch.tensor(order).argsort()
    labels = torch.tensor([row["labels"] for row in rows])
    return Seen(torch.cat(logits)[back], torch.cat(features)[back], labels)


def accuracy(seen: Seen) -> float:
    """Share of samples whose class has the largest logit."""
    return (seen.logits.argmax(dim=1) == seen.labels).double().mean().item()


def macro_f1(seen: Seen) -> float:
    """Mean of the classes' F1; a class that is in neither labels nor predictions does not count."""
    return float(np.nanmean(per_class(seen)[1]))


def per_class(seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """(recall, F1) of each class, NaN where it is undefined."""
    said, label = seen.logits.argmax(dim=1).numpy(), seen.labels.numpy()
    classes = np.arange(seen.logits.shape[1])
    hits = np.array([np.sum((said == c) & (label == c)) for c in classes], dtype=float)
    labelled = np.array([np.sum(label == c) for c in classes])
    predicted = np.array([np.sum(said == c) for c in classes])
    with np.errstate(invalid="ignore"):
        return hits / labelled, 2 * hits / (labelled + predicted)


def feature_drift(before: Seen, after: Seen) -> float:
    """Mean of ‖f - f0‖ / ‖f0‖ of the features that the head reads."""
    moved = (after.features - before.features).norm(dim=1) / before.features.norm(dim=1)
    return moved.mean().item()
