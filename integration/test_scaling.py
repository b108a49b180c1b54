"""docs/scaling.md says what the script counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("axolotl")
from balora_plugin.memory.estimate import GIB

from .configs.counted import counted
from .configs.page import trainings
from .scaling.measured import slope
from .scaling.needs import A40, SETUPS, moved, needs, spectrum_flop
from .scaling.page import PAGE, counts, tables, with_tables

SEVEN = SETUPS[0]


@pytest.fixture(scope="module")
def seven():
    return needs(SEVEN, trainings()[SEVEN.yaml])


def test_the_row_of_one_model_is_on_the_page(seven):
    text = PAGE.read_text(encoding="utf-8")
    for name, made in tables({SEVEN: seven}).items():
        assert made.splitlines()[-1] in text, name


@pytest.mark.long
def test_every_table_is_on_the_page():
    """`python -m integration.scaling` writes them."""
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text, tables(counts())) == text


def test_the_counts_are_those_of_the_other_pages(seven):
    """Memory is that of example_configs/README.md, FLOP a token that of docs/paper.md."""
    found = counted(trainings()[SEVEN.yaml])
    assert seven.bytes_on(1) / GIB == pytest.approx(found.gib)
    assert (sum(seven.flop.values()) - seven.flop["spectrum"]) / seven.tokens == pytest.approx(found.flop)


def test_a_7b_models_figures_are_those_of_its_shapes(seven):
    """By hand: 32 layers of four 4096 x 4096 and three 4096 x 11008, two embeddings of 32000 x 4096."""
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert seven.held["weights"] == pytest.approx(2 * (linear + 2 * 32000 * 4096), rel=1e-3)
    adapters = 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert seven.held["trained"] == 4 * adapters and seven.held["optimizer"] == pytest.approx(8 * adapters, rel=1e-3)
    attention = 4 * 512 * 4096 * 32
    assert seven.flop["teacher"] == pytest.approx((2 * linear + attention) * seven.tokens)
    assert seven.flop["teacher's head"] == 2 * 32000 * 4096 * seven.tokens
    assert seven.start == (2 * 1248 * linear, 2 * 3360 * linear)
    assert seven.hidden == 8192 and seven.gathered == 0


def test_a_part_takes_its_flop_or_its_bytes_whichever_is_more(seven):
    seconds = seven.seconds(A40)
    assert seconds["student"] == pytest.approx(seven.flop["student"] / (0.4 * 149.7e12))
    assert seconds["optimizer"] == pytest.approx(seven.moved["optimizer"] / 696e9)


def test_bytes_moved_by_hand():
    held = {"weights": 1000.0, "frozen_factors": 10.0, "trained": 20.0, "optimizer": 40.0}
    found = moved(held, 7.0, SimpleNamespace(vocab_size=11, hidden_size=3), micro=5, steps=2)
    assert found["teacher"] == 2 * (1000 + 5 * 7 * 2)
    assert found["student"] == found["recomputed"] == 2 * (1030 + 5 * 7 * 2)
    assert spectrum_flop(2, 3) == 4 * 2 * 9 + 4 * 4 * 3 + 12 * 8


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no place for bytes"):
        with_tables("", {"bytes": ""})


def test_slope():
    assert slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
