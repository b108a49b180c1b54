"""Scores of a classifier's predictions, in numpy alone: what an evaluation during training shows."""

from __future__ import annotations

from typing import Any

import numpy as np


def scores(prediction: Any) -> dict[str, float]:
    """Scores logits (N, D) against labels (N,), as a Trainer's `compute_metrics`: accuracy and macro-F1.

    For a single output: Pearson's correlation and mean squared error.
    """
    logits, labels = prediction.predictions, np.asarray(prediction.label_ids)
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float64)
    if logits.ndim == 1 or logits.shape[-1] == 1:
        values, labels = logits.reshape(-1), labels.reshape(-1).astype(np.float64)
        return {"pearson": _pearson(values, labels), "mse": float(np.square(values - labels).mean())}
    if labels.ndim > 1:  # several labels a sample
        right = (logits > 0) == (labels > 0.5)
        return {"accuracy": float(right.mean()), "exact": float(right.all(axis=-1).mean())}
    found = logits.argmax(axis=-1)
    return {"accuracy": float((found == labels).mean()), "macro_f1": _macro_f1(found, labels)}


def _macro_f1(found: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur, in either."""
    values = []
    for name in np.union1d(found, labels):
        hits = float(((found == name) & (labels == name)).sum())
        values.append(2 * hits / float((found == name).sum() + (labels == name).sum()))
    return float(np.mean(values))


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    """0 where one of them is constant: it predicts nothing."""
    one, other = one - one.mean(), other - other.mean()
    norm = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / norm if norm > 0 else 0.0
