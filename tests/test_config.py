"""Settings: what the presets resolve to, what overrides them, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re

import pytest

from balora_plugin.config import RegularizerConfig

FIELDS = (
    "lambda_consistency",
    "lambda_diversity",
    "lambda_svd",
    "consistency",
    "temperature",
    "diversity_top_k",
    "svd_top_k",
    "svd_norm",
    "schedule",
)
PRESETS = {
    ("paper", "nlg"): (1e-4, 3e-4, 1e-4, "kl", 1.0, 0, 10, "nuclear", "constant"),
    ("paper", "nlu"): (1e-4, 4e-4, 1e-4, "mse", 1.0, 0, 5, "none", "constant"),
    ("iclr2026", "nlg"): (0.025, 0.005, 0.005, "kl", 2.0, 20, 10, "frobenius", "iclr2026"),
    ("iclr2026", "nlu"): (0.15, 0.03, 0.03, "kl", 2.0, 0, 5, "nuclear", "iclr2026"),
}
OVERRIDES = {
    "lambda_consistency": 0.0,
    "lambda_diversity": 0,
    "lambda_svd": 7.5,
    "consistency": "jsd",
    "temperature": 3,
    "diversity_top_k": 50,
    "svd_top_k": 1,
    "svd_norm": "none",
    "svd_input": "features",
    "svd_layout": "flattened",
    "schedule": "iclr2026",
}


@pytest.mark.parametrize(("preset", "task"), PRESETS)
def test_preset_values(preset, task):
    resolved = RegularizerConfig(preset=preset).resolved(task)
    assert tuple(getattr(resolved, field) for field in FIELDS) == PRESETS[preset, task]
    assert (resolved.preset, resolved.task) == (preset, task)
    assert (resolved.svd_input, resolved.svd_layout) == ("logits", "rows")
    assert resolved.teacher_interval == 1


def test_the_default_is_the_paper():
    assert RegularizerConfig() == RegularizerConfig(preset="paper", task="auto")


@pytest.mark.parametrize("key", OVERRIDES)
@pytest.mark.parametrize("task", ["nlg", "nlu"])
def test_a_value_overrides_the_preset_and_nothing_else(key, task):
    if task == "nlu" and key in ("diversity_top_k", "svd_layout"):
        pytest.skip("refused: tests/objective/test_classification.py")
    resolved = RegularizerConfig(**{key: OVERRIDES[key]}).resolved(task)
    expected = dataclasses.replace(RegularizerConfig().resolved(task), **{key: OVERRIDES[key]})
    assert resolved == expected
    assert getattr(resolved, key) == OVERRIDES[key]


def test_resolved_returns_a_copy_and_is_idempotent():
    config = RegularizerConfig(preset="iclr2026", task="nlu")
    resolved = config.resolved()
    assert config.lambda_svd is None
    assert resolved.lambda_svd == 0.03
    assert resolved.resolved() == resolved.resolved("nlu") == resolved.resolved("auto") == resolved


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("preset", "balora", ValueError),
        ("preset", None, ValueError),
        ("task", "nlp", ValueError),
        ("task", None, ValueError),
        ("lambda_consistency", -1e-4, ValueError),
        ("lambda_consistency", math.nan, ValueError),
        ("lambda_consistency", "0.1", TypeError),
        ("lambda_diversity", math.inf, ValueError),
        ("lambda_diversity", True, TypeError),
        ("lambda_svd", -1, ValueError),
        ("lambda_svd", [0.1], TypeError),
        ("consistency", "KL", ValueError),
        ("consistency", 1, ValueError),
        ("temperature", 0, ValueError),
        ("temperature", -2.0, ValueError),
        ("temperature", math.nan, ValueError),
        ("temperature", "2", TypeError),
        ("diversity_top_k", -1, ValueError),
        ("diversity_top_k", 20.0, TypeError),
        ("diversity_top_k", False, TypeError),
        ("svd_top_k", 0, ValueError),
        ("svd_top_k", 2.5, TypeError),
        ("svd_norm", "l2", ValueError),
        ("svd_input", "hidden", ValueError),
        ("svd_layout", ["rows"], ValueError),
        ("schedule", "cosine", ValueError),
        ("teacher_interval", 0, ValueError),
        ("teacher_interval", None, TypeError),
        ("teacher_interval", 1.0, TypeError),
        ("share_interval", -1, ValueError),
        ("share_interval", True, TypeError),
        ("teacher_cache", " ", ValueError),
        ("teacher_cache", 3, TypeError),
        ("teacher_cache", b"cache", TypeError),
        ("teacher_cache_top_k", -1, ValueError),
        ("teacher_cache_top_k", True, TypeError),
        ("teacher_cache_top_k", 64.0, TypeError),
    ],
)
def test_bad_values_are_named(key, value, error):
    with pytest.raises(error) as caught:
        RegularizerConfig(**{key: value})
    assert f"{key}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teacher_cache_top_k": 64}, "without teacher_cache"),
        ({"teacher_cache_top_k": 64, "teacher_cache": "here", "consistency": "mse"}, "consistency='mse'"),
    ],
)
def test_log_probabilities_that_cannot_serve_are_refused(values, words):
    with pytest.raises(ValueError, match=f"teacher_cache_top_k=64.*{words}"):
        RegularizerConfig(**values)
    assert RegularizerConfig(**{**values, "teacher_cache_top_k": 0}).teacher_cache_top_k == 0


def test_boundary_values_are_accepted():
    config = RegularizerConfig(
        lambda_svd=0, temperature=0.01, diversity_top_k=0, svd_top_k=1, teacher_interval=1, share_interval=0
    )
    assert config.lambda_svd == 0


def test_flattened_centered_logits_are_refused():
    with pytest.raises(ValueError, match="svd_layout='flattened' with svd_input='centered_logits'"):
        RegularizerConfig(svd_layout="flattened", svd_input="centered_logits")


def test_resolved_refuses_another_task():
    with pytest.raises(ValueError, match=r"task='nlu' in the config.*task='nlg'"):
        RegularizerConfig(task="nlu").resolved("nlg")


@pytest.mark.parametrize("task", [None, "auto", "classification"])
def test_resolved_needs_a_task(task):
    with pytest.raises(ValueError, match="say 'nlg' or 'nlu'"):
        RegularizerConfig().resolved(task)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lambda_kl", "lambda_consistency"),
        ("lambda_cr", "lambda_consistency"),
        ("lambda3", "lambda_svd"),
        ("temprature", "temperature"),
        ("lambda_x", "lambda_consistency, lambda_diversity or lambda_svd"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, meant):
    words = re.escape(f"{key} is not a setting of RegularizerConfig: did you mean {meant}?")
    with pytest.raises(TypeError, match=words):
        RegularizerConfig(**{key: 1.0})
    with pytest.raises(ValueError, match=words):
        RegularizerConfig.from_dict({"preset": "paper", key: 1.0})


def test_an_unknown_key_that_is_near_nothing_lists_the_known():
    with pytest.raises(TypeError, match=r"zzz is not a setting.*lambda_consistency.*svd_top_k"):
        RegularizerConfig(zzz=1)


def test_the_signature_is_the_dataclasss_own():
    names = [field.name for field in dataclasses.fields(RegularizerConfig)]
    assert list(inspect.signature(RegularizerConfig).parameters) == names


@pytest.mark.parametrize("key", [1, None, True])
def test_a_key_that_is_no_text_is_no_setting(key):
    with pytest.raises(ValueError, match=rf"^{key} is not a setting of RegularizerConfig: "):
        RegularizerConfig.from_dict({key: 2, "lambda_svd": 0.1})


def test_from_dict_validates():
    with pytest.raises(ValueError, match="svd_top_k=0"):
        RegularizerConfig.from_dict({"svd_top_k": 0})


@pytest.mark.parametrize(
    "config",
    [
        RegularizerConfig(),
        RegularizerConfig(preset="iclr2026", svd_top_k=3, teacher_interval=4),
        RegularizerConfig(preset="iclr2026").resolved("nlg"),
    ],
)
def test_dict_round_trip_through_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert set(values) == {field.name for field in dataclasses.fields(config)}
    assert RegularizerConfig.from_dict(values) == config


def test_to_dict_keeps_what_the_preset_decides_open():
    assert RegularizerConfig(svd_top_k=3).to_dict()["svd_top_k"] == 3
    assert RegularizerConfig(svd_top_k=3).to_dict()["lambda_svd"] is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"drift_target": 0.1, "balance": {"consistency": 0.3}}, "drift_target=0.1 with balance.consistency=0.3"),
        ({"drift_target": 0.1, "schedule": "adaptive"}, "drift_target=0.1 with schedule='adaptive'"),
        ({"balance": {"consistency": 0.3}, "schedule": "adaptive"}, "balance.consistency=0.3 with schedule='adaptive'"),
        ({"drift_target": 0.1, "lambda_consistency": 0}, "lambda_consistency=0, .*leave lambda_consistency out"),
        ({"balance": {"svd": 0.1}, "lambda_svd": 0.0}, "balance.svd=0.1 with lambda_svd=0.*leave lambda_svd out"),
        ({"balance": {"svd": 0.1}, "share_interval": 0}, "share_interval=0.*leave share_interval out"),
        ({"balance": {"entropy": 0.1}}, "balance=.*'entropy', which is not known: write some of 'consistency'"),
        ({"balance": {"svd": 0.0}}, "balance.svd=0.0 must be a finite number > 0"),
        ({"balance": {}}, "balance={} says nothing"),
        ({"drift_target": 0.0}, "drift_target=0.0 must be a finite number from 1e-06 to 100"),
        ({"drift_target": 1e-300}, "drift_target=1e-300 must be a finite number from 1e-06 to 100"),
        ({"balance": {"svd": 1e30}}, r"balance\.svd=1e\+30 must be a finite number > 0 and <= 1000"),
        ({"lambda_consistency": 1e30}, r"lambda_consistency=1e\+30 must be a finite number from 0 to 1e\+06"),
        ({"lambda_svd": 10**5000}, r"lambda_svd=10\*\*5000 must be a finite number from 0 to 1e\+06"),
        ({"lambda_diversity": 10**400}, r"lambda_diversity=10\*\*400 must be a finite number"),
        ({"svd_top_k": 2**63}, "svd_top_k=9223372036854775808 must be <= 2147483647"),
        ({"diversity_top_k": 2**64}, "diversity_top_k=18446744073709551616 must be <= 2147483647"),
        ({"svd_max_rows": 10**5000}, r"svd_max_rows=10\*\*5000 must be <= 2147483647"),
        ({"svd_max_rows": -(10**5000)}, r"svd_max_rows=-10\*\*5000 must be >= 0"),
    ],
)
def test_weights_that_set_themselves_are_not_set_twice(values, words):
    with pytest.raises(ValueError, match=words):
        RegularizerConfig(**values)


@pytest.mark.parametrize("asked", [{"drift_target": 0.1}, {"schedule": "adaptive"}])
def test_what_is_measured_at_one_needs_a_cache_that_has_it(asked):
    cached = {**asked, "teacher_cache": "here", "temperature": 2.0}
    with pytest.raises(ValueError, match=r"measured at T = 1.*temperature=2 alone: write teacher_cache_top_k=0"):
        RegularizerConfig(**cached).resolved("nlg")
    for more in ({"teacher_cache_top_k": 0}, {"temperature": 1.0}, {"consistency": "mse"}):
        RegularizerConfig(**{**cached, **more}).resolved("nlg")


def test_weights_that_set_themselves_replace_lambdas_alone():
    plain = RegularizerConfig(preset="iclr2026").resolved("nlg")
    own = RegularizerConfig(preset="iclr2026", drift_target=0.1, balance={"svd": 1}).resolved("nlg")
    assert own == dataclasses.replace(plain, drift_target=0.1, balance={"svd": 1.0}, lambda_consistency=1.0)
    assert own.resolved() == own
    assert RegularizerConfig(drift_target=0.1, lambda_consistency=0.3).resolved("nlg").lambda_consistency == 0.3
    assert RegularizerConfig.from_dict(own.to_dict()) == own
    assert (own.holds("consistency"), own.holds("diversity")) == ("held at a drift of 0.1", None)


def test_a_budget_in_nats_is_of_a_term_in_nats():
    """A preset's squared difference of unit rows has none; what is written stays."""
    assert RegularizerConfig().resolved("nlu").consistency == "mse"
    found = RegularizerConfig(drift_target=0.1).resolved("nlu")
    assert (found.consistency, found.temperature) == ("kl", 1.0)
    assert RegularizerConfig(drift_target=0.1, consistency="mse").resolved("nlu").consistency == "mse"
    assert RegularizerConfig(drift_target=0.1, preset="iclr2026").resolved("nlu").temperature == 2.0
