"""Anchors by step: as many as were asked for, however a global batch is cut, and nothing is kept in between."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest

from balora_plugin.anchors.stream import Stream


@pytest.mark.parametrize("per_step", [Fraction(1, 10), Fraction(2, 5), Fraction(1), Fraction(17, 5)])
def test_the_mean_is_the_fraction_and_each_document_comes_in_turn(per_step):
    stream = Stream(7, per_step)
    steps = [stream.of_step(step) for step in range(350)]
    assert sum(map(len, steps)) == 350 * per_step
    assert {len(step) for step in steps} <= {int(per_step), int(per_step) + 1}
    met = Counter(document for step in steps for document in step)
    assert max(met.values()) - min(met.values()) <= 1 and len(met) == 7
    mean = sum(stream.weight for step in steps if step) / len(steps)
    assert mean == pytest.approx(1.0)  # of a term that is a mean where there are anchors


def test_passes_differ_and_so_do_seeds():
    stream = Stream(20, Fraction(20))
    assert sorted(stream.of_step(0)) == sorted(stream.of_step(1)) == list(range(20))
    assert stream.of_step(0) != stream.of_step(1)
    assert stream.of_step(0) != Stream(20, Fraction(20), seed=1).of_step(0)
    assert stream.of_step(1) == Stream(20, Fraction(20)).of_step(1)  # without the step before it


@pytest.mark.parametrize(("processes", "count"), [(1, 1), (1, 4), (2, 2), (3, 1), (4, 3)])
def test_a_step_has_the_same_documents_however_it_is_cut(processes, count):
    whole = Stream(50, Fraction(17, 5))
    stream = Stream(50, Fraction(17, 5), processes)
    first = Counter()
    for step in range(40):
        parts = [stream.of_micro_batch(step, rank, micro, count) for rank in range(processes) for micro in range(count)]
        dealt = [document for part in parts for document in part]
        assert sorted(dealt) == sorted(whole.of_step(step)) and len(set(dealt)) == len(dealt)
        for rank in range(processes):
            own = [d for micro in range(count) for d in stream.of_micro_batch(step, rank, micro, count)]
            assert own == stream.of_process(step, rank)  # also where an epoch ends with fewer micro-batches
            first[rank] += len(own)
    assert max(first.values()) - min(first.values()) <= 40 * 0.4  # no process has always more
    met = [document for _, document in stream.met_by(0, 40)]
    assert met == [d for step in range(40) for d in stream.of_process(step, 0)]
