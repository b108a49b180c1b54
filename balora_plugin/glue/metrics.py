"""GLUE's scores, by scikit-learn and the scipy it stands on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ..findings import how_to_install


def score(
    names: Sequence[str], found: Sequence[float], gold: Sequence[float], *, positive: int = 1
) -> dict[str, float]:
    """Returns the named scores of predictions against labels, in percent as GLUE is reported.

    accuracy, f1 (of the class `positive`), matthews, pearson, spearman; a correlation with a constant is 0.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: no samples, or an unknown score.
    """
    try:
        from scipy import stats
        from sklearn import metrics
    except ImportError as error:
        raise ImportError(f"balora glue needs {error.name}: {how_to_install('glue')}.") from None
    if not len(gold):
        raise ValueError("there are no samples with a label to score.")
    functions = {
        "accuracy": metrics.accuracy_score,
        "f1": lambda y, x: metrics.f1_score(y, x, pos_label=positive, zero_division=0.0),
        "matthews": metrics.matthews_corrcoef,
        "pearson": lambda y, x: stats.pearsonr(y, x).statistic if len(y) > 1 else 0.0,
        "spearman": lambda y, x: stats.spearmanr(y, x).statistic if len(y) > 1 else 0.0,
    }
    found_scores = {}
    for name in names:
        if name not in functions:
            raise ValueError(f"score {name!r} is not known: {', '.join(functions)}.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a constant prediction, which is no error here
            value = float(functions[name](list(gold), list(found)))
        found_scores[name] = 100.0 * (value if value == value else 0.0)
    return found_scores
