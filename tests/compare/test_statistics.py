"""The paired bootstrap against plain loops, and what few rows cannot tell."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from balora_plugin.compare.plan import LORA_RATES, METHODS, PISSA_RATES, GridSettings, grid
from balora_plugin.compare.results import BestDifference, results_of
from balora_plugin.compare.statistics import DRAWS, Interval, RowSums, limits, paired_difference
from balora_plugin.config import TERMS, RegularizerConfig
from balora_plugin.weights.rules import rules_of


def rows(seeds=2, count=6, shift=0.0, seed=3):
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 9, (1, count)).repeat(seeds, axis=0)
    return RowSums((generator.normal(2.0, 0.3, (seeds, count)) + shift) * counts, counts)


def slowly(one, other):
    """The same draws, by loops over seeds and rows."""
    generator = np.random.default_rng(0)
    seeds, count = one.sums.shape
    found = []
    for _ in range(DRAWS):
        s, r = generator.integers(seeds, size=seeds), generator.integers(count, size=count)
        means = []
        for each in (one, other):
            of_seeds = [sum(each.sums[i][j] for j in r) / sum(each.counts[i][j] for j in r) for i in s]
            means.append(sum(of_seeds) / seeds)
        found.append(means[1] - means[0])
    found.sort()
    return np.quantile(found, [0.025, 0.975])


def test_the_interval_is_that_of_plain_loops():
    one, other = rows(), rows(shift=-0.2, seed=4)
    found = paired_difference(one, other)
    assert (found.low, found.high) == pytest.approx(tuple(slowly(one, other)), rel=1e-9)
    expected = np.mean([o.sum() / c.sum() for o, c in zip(other.sums, other.counts, strict=True)]) - one.mean
    assert found.difference == pytest.approx(expected)


def test_pairs_tell_apart_what_scatter_would_hide():
    one = rows(count=12)
    moved = RowSums(one.sums - 0.01 * one.counts, one.counts)
    found = paired_difference(one, moved)
    assert (found.low, found.high) == pytest.approx((-0.01, -0.01)) and found.told_apart
    assert not paired_difference(one, one).told_apart
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference(one, rows(count=5))


def test_what_cannot_be_told_is_said():
    said = " ".join(limits(4, 1, [Interval(0.1, -0.2, 0.4)]))
    assert "4 held-out rows" in said and "One seed" in said and "below about 0.3" in said
    assert limits(400, 8, []) == []


def test_a_best_rate_at_the_edge_is_said():
    losses = {1e-4: 2.0, 1e-3: 1.5, 1e-2: 1.7}
    inside = [record("lora", rate, 0, loss) for rate, loss in losses.items()]
    said = results_of([*inside, record("full", 1e-3, 0, 1.0)], (16, 2)).limits
    assert not any("edge" in each for each in said)  # of a single rate there is none
    low, high = ([record(m, r, 0, sign * r) for r in (1e-5, 1e-4)] for m, sign in (("pissa", 1), ("ba_lora", -1)))
    (line,) = [each for each in results_of([*inside, *low, *high], (16, 2)).limits if "edge" in each]
    assert "pissa 1e-05 (the lowest), ba_lora 0.0001 (the highest)." in line


def test_each_start_has_the_rates_that_are_recommended_for_it():
    text = (Path(__file__).parents[2] / "docs" / "choose.md").read_text(encoding="utf-8")
    for start, rates in (("LoRA", LORA_RATES), ("PiSSA", PISSA_RATES)):
        row = next(line for line in text.splitlines() if re.match(rf"\| {start} \| \S+ .*to ", line)).split("|")[2]
        assert [float(each) for each in re.findall(r"\de-\d", row)] == list(rates)
    cells = grid(["lora_terms", "ba_lora", "ba_lora"], [], [0])
    assert [(cell.method, cell.rate) for cell in cells] == [
        *(("lora_terms", rate) for rate in LORA_RATES),
        *(("ba_lora", rate) for rate in PISSA_RATES),
    ]
    assert {cell.rate for cell in grid(METHODS, [3e-4], [0])} == {3e-4}


def record(method, rate, seed, loss):
    measured = {"loss": [loss, loss], "count": [1.0, 1.0], "drift": [0.1, 0.2]}
    final = {"loss": loss, "balora/drift": 0.15}
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "final": final,
        "rows": measured,
        "first_gradient_norm": 1.0,
        "seconds": 1.0,
    }


def test_each_method_is_taken_at_its_best_rate():
    losses = {("lora", 1e-4): 2.0, ("lora", 1e-3): 1.5, ("ba_lora", 1e-4): 1.4, ("ba_lora", 1e-3): float("nan")}
    records = [record(*cell, seed, loss) for cell, loss in losses.items() for seed in (0, 1)]
    found = results_of(records, (16, 2))
    assert {line.method: line.rate for line in found.best} == {"lora": 1e-3, "ba_lora": 1e-4}
    assert [(each.method, each.against, each.measure) for each in found.differences] == [
        ("ba_lora", "lora", "loss"),
        ("ba_lora", "lora", "drift"),
    ]
    assert found.differences[0].interval.difference == pytest.approx(-0.1) and found.differences[0].verdict == "lower"
    assert any("chosen by the same held-out rows" in each for each in found.limits)
    assert "| lora * | 0.001 | 2 | 1.5 ± 0 |" in found.markdown()


def test_terms_are_also_held_against_their_start_without_them():
    found = results_of([record(m, 1e-4, 0, 1.0) for m in ("lora", "pissa", "ba_lora", "lora_terms")], (16, 2))
    pairs = [(each.method, each.against) for each in found.differences if each.measure == "loss"]
    assert pairs == [("pissa", "lora"), ("ba_lora", "lora"), ("lora_terms", "lora"), ("ba_lora", "pissa")]
    only = results_of([record(m, 1e-4, 0, 1.0) for m in ("pissa", "ba_lora")], (16, 2))
    assert [each.against for each in only.differences if each.measure == "loss"] == ["pissa"]


def test_a_diverged_run_is_neither_better_nor_worse():
    one = rows()
    diverged = RowSums(one.sums * np.nan, one.counts)
    found = paired_difference(one, diverged)
    assert not found.told_apart
    assert BestDifference("pissa", "lora", "loss", found).verdict == "no number"
    said = " ".join(limits(50, 5, [found, Interval(0.1, 0.0, 0.2)]))
    assert "nan" not in said
    assert "diverged" in said and "below about 0.1" in said


@pytest.mark.parametrize(
    "asked",
    [
        {"drift_target": 0.1},
        {"balance": {"consistency": 0.3}},
        {"schedule": "adaptive"},
        {"anchor_data": "rows.jsonl"},
        {"teacher_cache": "cache", "teacher_cache_top_k": 8},
    ],
    ids=str,
)
def test_a_baseline_has_nothing_that_sets_or_serves_a_weight(asked):
    terms = RegularizerConfig(**asked)
    recipe = GridSettings("model", steps=20, rank=4, batch=2, max_length=8, terms=terms, data="")
    assert recipe.terms_of("ba_lora").drift_target == terms.drift_target
    found = recipe.terms_of("lora").resolved("nlg")
    assert rules_of(found, 20) == {}
    assert not any(getattr(found, f"lambda_{name}") for name in TERMS)
    assert (found.anchor_data, found.teacher_cache, found.monitor) == (None, None, True)
