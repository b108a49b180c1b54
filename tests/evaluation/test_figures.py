"""Standard errors: lm-eval's of a mean, the delta method's of a ratio, resampling's of the rest; pairs by document."""

from __future__ import annotations

import math

import numpy as np
import pytest

from balora_plugin.evaluation.calibration import BINS, ECE, bin_sums, calibration_error, choice_sums
from balora_plugin.evaluation.diversity import ngram_counts
from balora_plugin.evaluation.figures import MEAN, RATIO, Aggregate, Figure, difference, measured
from balora_plugin.evaluation.table import as_json, as_rows, as_table, not_finite


def paired(n=400, noise=0.05):
    """Values of two sides that agree but for a little."""
    draw = np.random.default_rng(0)
    base = draw.normal(size=n)
    return {"base": list(base), "adapter": list(base + 0.1 + noise * draw.normal(size=n))}


def ratios(n=400):
    draw = np.random.default_rng(1)
    counts = draw.integers(1, 40, size=n)
    base = counts * (2.0 + 0.3 * draw.normal(size=n))
    other = base + counts * (0.2 + 0.05 * draw.normal(size=n))
    return {
        name: list(zip(map(float, sums), map(int, counts), strict=True))
        for name, sums in (("base", base), ("adapter", other))
    }


def resampled(values, value, draws=4000):
    """The spread of a figure over resampled documents: the slow, obvious error."""
    draw = np.random.default_rng(7)
    found = []
    for _ in range(draws):
        chosen = draw.integers(0, len(values), len(values))
        found.append(value([values[i] for i in chosen]))
    return float(np.std(found))


def test_a_mean_has_the_error_of_a_mean():
    values = paired()
    figure = Figure("t", "m", values)
    found = measured(figure, "base")
    assert found.value == pytest.approx(np.mean(values["base"]))
    assert found.error == pytest.approx(np.std(values["base"], ddof=1) / math.sqrt(400))


def test_differences_are_paired_by_document():
    values = paired()
    figure = Figure("t", "m", values)
    found = difference(figure, "base", "adapter")
    each = np.subtract(values["adapter"], values["base"])
    assert found.value == pytest.approx(each.mean())
    assert found.error == pytest.approx(each.std(ddof=1) / 20)
    apart = math.hypot(measured(figure, "base").error, measured(figure, "adapter").error)
    assert found.error < apart / 10  # what treating the two as strangers would say


def test_the_error_of_a_ratio_is_that_of_resampled_documents():
    values = ratios()
    figure = Figure("t", "loss", values, RATIO)

    def ratio(pairs):
        return sum(p[0] for p in pairs) / sum(p[1] for p in pairs)

    found = measured(figure, "base")
    assert found.value == pytest.approx(ratio(values["base"]))
    assert found.error == pytest.approx(resampled(values["base"], ratio), rel=0.06)
    both = list(zip(values["base"], values["adapter"], strict=True))
    slow = resampled(both, lambda pairs: ratio([b for _, b in pairs]) - ratio([a for a, _ in pairs]))
    apart = difference(figure, "base", "adapter")
    assert apart.error == pytest.approx(slow, rel=0.06)
    assert apart.value == pytest.approx(0.2, abs=0.02)


def test_resampling_gives_a_mean_its_known_error():
    values = paired()
    figure = Figure("t", "m", values, Aggregate(MEAN.value))
    known = Figure("t", "m", values)
    assert measured(figure, "base").error == pytest.approx(measured(known, "base").error, rel=0.12)
    assert difference(figure, "base", "adapter").error == pytest.approx(
        difference(known, "base", "adapter").error, rel=0.12
    )


def test_one_document_has_no_error_and_nothing_counted_no_value():
    assert measured(Figure("t", "m", {"base": [2.0]}), "base").error is None
    nothing = Figure("t", "distinct_2", {"base": [(0, 0), (0, 0)]}, RATIO)
    assert math.isnan(measured(nothing, "base").value)
    assert not_finite([nothing]) == []  # no model is broken by saying nothing
    assert not_finite([Figure("t", "loss", {"base": [(math.nan, 3), (1.0, 3)]}, RATIO)]) == ["t, loss"]


def test_the_table_and_the_file_say_the_same():
    figures = [
        Figure("t", "m", {"base": [1.0, 2.0], "adapter": [2.0, 4.0]}, better=True),
        Figure("t", "kl", {"adapter": [(1.0, 2), (1.0, 2)]}, RATIO, better=False),
    ]
    rows = as_rows(figures, ["base", "adapter"])
    first, second = as_json(rows)
    assert first["difference"] == {"value": 1.5, "stderr": 0.5} and first["documents"] == 2
    assert second["adapter"] == {"value": 0.5, "stderr": 0.0} and "base" not in second and "difference" not in second
    lines = as_table(rows, ["base", "adapter"]).splitlines()
    assert "| +1.5000 ± 0.5000 |" in lines[2] and "0.5000 ± 0.0000" in lines[3]
    assert len({len(line) for line in lines}) == 1


def test_calibration_by_hand():
    confidence, right = np.array([0.95, 0.94, 0.52, 1.0]), np.array([1.0, 0.0, 1.0, 1.0])
    expected = abs(0.95 + 0.94 + 1.0 - 2.0) / 4 + abs(0.52 - 1.0) / 4  # two bins of a fifteenth
    halves = [bin_sums(confidence[:2], right[:2]), bin_sums(confidence[2:], right[2:])]
    assert calibration_error(halves) == pytest.approx(expected)
    assert halves[0].shape == (BINS, 3)
    assert measured(Figure("t", "ece", {"base": halves}, ECE), "base").value == pytest.approx(expected)


def test_confidence_in_a_choice_is_the_softmax_over_its_answers():
    likelihoods = [-5.0, -4.0, -7.0]
    top = math.exp(-4.0) / sum(math.exp(x) for x in likelihoods)
    bins = choice_sums(likelihoods, target=0)
    assert bins[:, 1].sum() == pytest.approx(top) and bins[:, 2].sum() == 0.0
    assert choice_sums(likelihoods, target=1)[:, 2].sum() == 1.0


def test_distinct_n_by_hand():
    assert ngram_counts("a b a b c", 1) == (3, 5)
    assert ngram_counts("a b a b c", 2) == (3, 4)
    assert ngram_counts("", 1) == ngram_counts("a", 2) == (0, 0)
