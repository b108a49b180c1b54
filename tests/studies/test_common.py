"""What the studies share: intervals and fronts against what they must be, cells that are not run twice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from studies.common.bootstrap import intervals, paired_mean
from studies.common.fronts import front, price_at
from studies.common.records import Cell, Runs, read
from studies.common.tables import mean_and_spread


def test_an_interval_is_that_of_the_mean_and_a_pair_sees_one_draw():
    values = np.random.default_rng(1).normal(size=400)
    found = paired_mean(values)
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    one, other = values, values + 0.01  # unpaired, this difference would drown
    difference = intervals(
        lambda w: np.array([np.average(other, weights=w["d"]) - np.average(one, weights=w["d"])]), {"d": 400}
    )[0]
    assert difference.low == pytest.approx(0.01) and difference.leaves_out_zero()


def test_draws_in_which_nothing_is_known_do_not_count():
    found = intervals(lambda w: np.array([np.nan, 1.0 if w["d"][0] else np.nan]), {"d": 3}, repeats=50)
    assert np.isnan(found[0].value) and found[0].text() == "-"
    assert (found[1].low, found[1].high) == (1.0, 1.0)


def test_a_front_holds_what_nothing_beats_and_its_price_lies_on_lines():
    points = np.array([[1.0, 0.4], [1.2, 0.2], [1.1, 0.5], [1.4, 0.1], [1.3, 0.2]])
    assert front(points).tolist() == [[1.0, 0.4], [1.2, 0.2], [1.4, 0.1]]
    assert price_at(points, 1.1) == pytest.approx(0.3)
    assert price_at(points, 2.0) == pytest.approx(0.1)
    assert np.isnan(price_at(points, 0.9))


def test_a_cell_runs_once_and_other_sizes_are_refused(tmp_path):
    runs, cell = Runs(tmp_path, {"steps": 2}), Cell("one", {"seed": 1})
    assert runs.once(cell, lambda: {"found": [1 / 3]})
    assert not runs.once(cell, lambda: pytest.fail("run again"))
    assert not Runs(tmp_path, {"steps": 2}).once(cell, lambda: pytest.fail("run again"))
    with pytest.raises(SystemExit, match=r"one.json was run with steps = 2, now 3"):
        Runs(tmp_path, {"steps": 3})
    assert read(tmp_path)[0]["found"] == [0.333333]
    assert json.loads((tmp_path / "one.json").read_text())["setting"] == {"seed": 1}


def test_a_run_that_fails_leaves_no_record(tmp_path):
    runs = Runs(tmp_path, {})
    with pytest.raises(ZeroDivisionError):
        runs.once(Cell("one", {}), lambda: {"found": 1 / 0})
    assert read(tmp_path) == []


def test_mean_and_spread():
    assert mean_and_spread([1.0]) == "1.000"
    assert mean_and_spread([1.0, 3.0], 1) == "2.0 ± 1.4"
