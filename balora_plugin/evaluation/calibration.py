"""Expected calibration error: how far the confidence in what is most likely is from how often it is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .figures import Aggregate

BINS = 15  # of equal width between 0 and 1


def bin_sums(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns count, sum of confidence and sum of `right` in each bin of confidence, (BINS, 3), of vectors (n)."""
    sums = np.zeros((BINS, 3))
    place = np.minimum((np.nan_to_num(confidence) * BINS).astype(int), BINS - 1)  # NaN stays one in the sums
    for column, values in enumerate((np.ones_like(confidence), confidence, right)):
        np.add.at(sums[:, column], place, values)
    return sums


def choice_sums(likelihoods: Sequence[float], target: int) -> np.ndarray:
    """Returns the bin sums of one question: confidence is the softmax over its answers' log-likelihoods."""
    values = np.exp(np.asarray(likelihoods, dtype=np.float64) - max(likelihoods))
    confidence = values / values.sum()
    guess = int(confidence.argmax())
    return bin_sums(confidence[[guess]], np.asarray([float(guess == target)]))


def calibration_error(bins: Sequence[np.ndarray]) -> float:
    """Returns the sum over bins of |mean confidence - share of hits|, weighted by their part of all predictions."""
    total = np.sum(bins, axis=0)
    count = total[:, 0].sum()
    return float(np.abs(total[:, 1] - total[:, 2]).sum() / count) if count else float("nan")


ECE = Aggregate(calibration_error)
