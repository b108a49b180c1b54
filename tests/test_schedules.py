"""The weights over training, at the points where the published schedule bends."""

from __future__ import annotations

import itertools

import pytest

from balora_plugin.config import RegularizerConfig
from balora_plugin.schedules import Lambdas, lambdas_at

ICLR = RegularizerConfig(preset="iclr2026").resolved("nlg")


@pytest.mark.parametrize("progress", [-1.0, 0.0, 0.2, 0.225, 1.0, 2.0])
@pytest.mark.parametrize("task", ["nlg", "nlu"])
def test_constant(progress, task):
    config = RegularizerConfig(preset="paper").resolved(task)
    assert lambdas_at(config, progress) == Lambdas(1e-4, 3e-4 if task == "nlg" else 4e-4, 1e-4)


@pytest.mark.parametrize(
    ("progress", "cosine", "ramp"),
    [
        (0.0, 1.0, 0.0),
        (0.1, 0.9779754323, 0.0),
        (0.2, 0.9140576475, 0.0),
        (0.225, 0.8921826845, 0.5),
        (0.25, 0.8681980515, 1.0),
        (0.5, 0.55, 1.0),
        (1.0, 0.1, 1.0),
    ],
)
def test_iclr2026(progress, cosine, ramp):
    consistency, diversity, svd = lambdas_at(ICLR, progress)
    assert consistency == pytest.approx(0.025 * cosine, rel=1e-9)
    assert diversity == pytest.approx(0.005 * ramp, rel=1e-9, abs=1e-15)
    assert svd == pytest.approx(0.005 * ramp, rel=1e-9, abs=1e-15)


def test_each_weight_follows_its_own_setting():
    config = RegularizerConfig(
        schedule="iclr2026", lambda_consistency=1.0, lambda_diversity=2.0, lambda_svd=4.0
    ).resolved("nlu")
    assert lambdas_at(config, 0.225) == pytest.approx((0.8921826845, 1.0, 2.0), rel=1e-9)


def test_iclr2026_is_monotone():
    values = [lambdas_at(ICLR, i / 200) for i in range(201)]
    for before, after in itertools.pairwise(values):
        assert after.consistency < before.consistency
        assert after.diversity >= before.diversity
        assert after.svd >= before.svd


def test_progress_is_clamped():
    assert lambdas_at(ICLR, -0.5) == lambdas_at(ICLR, 0.0)
    assert lambdas_at(ICLR, 1.5) == lambdas_at(ICLR, 1.0)
    assert lambdas_at(ICLR, 1.5).consistency == pytest.approx(0.0025)


def test_an_unresolved_config_is_refused():
    with pytest.raises(ValueError, match="resolved"):
        lambdas_at(RegularizerConfig(), 0.5)
    partly = RegularizerConfig(lambda_consistency=0.1, lambda_diversity=0.1, lambda_svd=0.1)
    with pytest.raises(ValueError, match="schedule=None"):
        lambdas_at(partly, 0.5)
