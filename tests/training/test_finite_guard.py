"""What a run that overflowed says to write: the weights that may have done it before the learning rate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from balora_plugin.config import RegularizerConfig
from balora_plugin.training.finite_guard import heavy_weights
from balora_plugin.training.own_weights import OwnWeights


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"lambda_consistency": 0.3}, []),
        ({"lambda_consistency": 1e5, "lambda_svd": 2e3}, ["a lower lambda_consistency (now 100000)",
         "a lower lambda_svd (now 2000)"]),
        ({"drift_target": 1e-5, "lambda_consistency": 4e5},
         ["a higher drift_target (now 1e-05, with lambda_consistency at 4e+05)"]),
    ],
)  # fmt: skip
def test_heavy_weights_are_named_first(terms, words):
    config = RegularizerConfig(**terms).resolved("nlg")
    assert heavy_weights(SimpleNamespace(config=config, own=OwnWeights(config))) == words
    assert heavy_weights(None) == []
