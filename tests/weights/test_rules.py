"""The rules beside a slow, obvious reference each, at their fixed points, and through a checkpoint."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_plugin.config import RegularizerConfig
from balora_plugin.schedules import Lambdas
from balora_plugin.weights import balance
from balora_plugin.weights.adaptive import HORIZON, ByEntropy, adaptive_weight
from balora_plugin.weights.balance import HeldShares
from balora_plugin.weights.drift import HeldDrift
from balora_plugin.weights.observed import Observed
from balora_plugin.weights.rules import rules_of
from balora_plugin.weights.smoothing import RunningMean

FULL = Lambdas(1.0, 3e-4, 1e-4)


def mean_of(values, horizon):
    """The running mean, written out."""
    b = 1.0 - 1.0 / horizon
    weights = [b ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("horizon", [1.0, 2.0, 7.5])
def test_the_running_mean_has_no_pull_to_0(horizon):
    values = [3.0, 0.5, -2.0, 4.0, 4.0, 1.0]
    found = RunningMean(horizon)
    for i, value in enumerate(values):
        assert found.add(value) == pytest.approx(mean_of(values[: i + 1], horizon), rel=1e-12)


def reference_weight(drifts, task, target, start, steps):
    """The weight after these drifts, written out from the docs; each bound is met at every step."""
    pace, horizon = min(max(steps / 12, 20.0), 400.0), min(max(steps / 100, 2.0), 50.0)
    low, high, weight, before, below = 1e-3 * task / target, 10 * task / target, start, -0.5, 0
    for i in range(len(drifts)):
        error = max(min(mean_of(drifts[: i + 1], horizon) / target - 1, 1.0), -0.5)
        below = below + 1 if error == -0.5 else 0
        sum_of = 2 / pace * error if error > -0.5 else -25 / steps * min(below / 10, 1.0)
        weight = min(max(min(max(weight, low), high) * math.exp(2 * (error - before) + sum_of), low), high)
        before = error
    return weight


@pytest.mark.parametrize("start", [1e-4, 0.7, 1e4])
@pytest.mark.parametrize("steps", [40, 200, 10_000])
def test_a_drift_moves_the_weight_by_its_errors_alone(steps, start):
    generator = random.Random(steps)
    drifts = [0.0] * 12 + [0.01, *(0.2 * math.exp(generator.gauss(-0.2, 0.4)) for _ in range(12))]
    rule = HeldDrift(0.15, start, steps)
    for i, value in enumerate(drifts):
        rule.observe(Observed(drift=value, task=1.3 if i == 0 else 0.9))  # the first task loss sets the bounds
        assert rule.weights(FULL, FULL).consistency == pytest.approx(
            reference_weight(drifts[: i + 1], 1.3, 0.15, start, steps), rel=1e-9
        )


def answered(rule, steps, *, lag, power, noise=0.15, seed=0):
    """Drifts of a model that goes to 0.5 (1 + t / 2) / (1 + 5 weight)^power, ever more slowly (a falling rate).

    It answers late: the way that it goes is a mean over about ten steps, as with an optimizer's momentum.
    """
    generator, at, pace, found = random.Random(seed), 0.0, 0.0, []
    for step in range(steps):
        found.append(at * math.exp(noise * generator.gauss(0, 1)))
        rule.observe(Observed(drift=found[-1], task=2.0))
        goal = 0.5 * (1 + 0.5 * step / steps) / (1 + 5 * rule.weights(FULL, FULL).consistency) ** power
        pace += 0.1 * (goal - at - pace)
        at = max(at + pace * min((1 - step / steps) / lag, 1.0), 0.0)
    return found


def last_third(values):
    return sum(values[-(len(values) // 3) :]) / (len(values) // 3)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("lag", [5, 15])
@pytest.mark.parametrize("target", [0.05, 0.2])
@pytest.mark.parametrize("steps", [200, 1000])
@pytest.mark.parametrize("start", [1e-4, 1e-2, 1.0, 1e2, 1e4])
def test_a_budget_is_held_from_any_start(start, steps, target, lag, power):
    found = answered(HeldDrift(target, start, steps), steps, lag=lag, power=power)
    assert last_third(found) == pytest.approx(target, rel=0.1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    start=st.floats(-4, 4),
    target=st.floats(0.06, 0.25),
    power=st.floats(0.5, 1.8),
    lag=st.floats(3, 20),
    noise=st.floats(0, 0.4),
    seed=st.integers(0, 99),
)
def test_no_start_and_no_answer_makes_it_swing(start, target, power, lag, noise, seed):
    found = answered(HeldDrift(target, 10**start, 400), 400, lag=lag, power=power, noise=noise, seed=seed)
    assert last_third(found) == pytest.approx(target, rel=0.15)
    late = [sum(found[i : i + 40]) / 40 for i in range(200, 360, 10)]
    assert max(late) < 1.5 * target
    assert min(late) > 0.5 * target


class Unweighted:
    """No term at all."""

    weight = 0.0

    def observe(self, measured):
        """Nothing follows."""


def adam(rule, steps, *, scale, seed, reach=4.0):
    """Drifts of a model s * theta under Adam, rate falling to 0, noisy gradients; freely it goes to 0.5.

    s is small at first, as with a new head over an adapter: nothing moves for a while, then all of it.
    """
    generator = random.Random(seed)
    goals = [generator.choice((-1, 1)) * (0.5 + generator.random()) for _ in range(4)]
    curves = [10 ** generator.uniform(-0.7, 0.7) for _ in goals]
    unit = 0.5 / sum(goal**2 for goal in goals)
    at, first, second, found = [0.0] * 4 + [0.1], [0.0] * 5, [0.0] * 5, []
    for step in range(1, steps + 1):
        moved = [at[-1] * x for x in at[:-1]]
        found.append(unit * sum(x * x for x in moved) * math.exp(0.2 * generator.gauss(0, 1)))
        rows = [
            scale * h * (x - goal + generator.gauss(0, 1)) / 4 + rule.weight * 2 * unit * x
            for h, x, goal in zip(curves, moved, goals, strict=True)
        ]
        gradients = [row * at[-1] for row in rows] + [sum(map(float.__mul__, rows, at))]
        rate = 2 * reach / steps * min(1.0, 20 * step / steps) * (1 - step / steps)
        for i, gradient in enumerate(gradients):
            first[i] += 0.1 * (gradient - first[i])
            second[i] += 0.001 * (gradient**2 - second[i])
            at[i] -= rate * (first[i] / (1 - 0.9**step)) / (math.sqrt(second[i] / (1 - 0.999**step)) + 1e-12)
        rule.observe(Observed(drift=found[-1], task=3 * scale))
    return found


@pytest.mark.parametrize("scale", [0.03, 1.0, 10.0])
@pytest.mark.parametrize("part", [0.5, 0.25])
def test_a_budget_is_held_under_adam(part, scale):
    """Whatever the task's loss is measured in; a start of 1 is far too high or low for two of them."""
    off = []
    for seed in range(8):
        target = part * last_third(adam(Unweighted(), 400, scale=scale, seed=seed))
        off.append(last_third(adam(HeldDrift(target, 1.0, 400), 400, scale=scale, seed=seed)) / target - 1)
    assert sum(map(abs, off)) / len(off) < 0.1
    assert max(map(abs, off)) < 0.3


def test_the_budget_is_the_only_fixed_point():
    rule = HeldDrift(0.2, 1.0, 100)
    for _ in range(200):
        rule.observe(Observed(drift=0.2, task=1.0))
    held = rule.weight
    rule.observe(Observed(drift=0.2))
    assert rule.weight == pytest.approx(held, rel=1e-9)
    for value, moves in ((0.22, 1), (0.18, -1)):
        other = HeldDrift(0.2, 1.0, 100)
        other.load(rule.state())
        for _ in range(5):
            other.observe(Observed(drift=value))
        assert (other.weight - held) * moves > 0


@pytest.mark.parametrize(("in_nats", "bounds"), [(True, (0.005, 50.0)), (False, (1e-6, 1e6))])
def test_a_weight_stays_within_what_a_multiplier_can_be(in_nats, bounds):
    """A term that is no distance of probabilities has no such scale."""
    for value, bound in zip((0.0, 9.0), bounds, strict=True):
        rule = HeldDrift(0.2, 1.0, 100, in_nats=in_nats)
        for _ in range(400):
            rule.observe(Observed(drift=value, task=1.0))
        assert rule.weight == pytest.approx(bound)


def test_a_resumed_rule_is_bounded_by_the_budget_that_it_has_now():
    before, rule = HeldDrift(0.2, 1.0, 100), HeldDrift(0.4, 1.0, 100)
    before.observe(Observed(drift=0.2, task=1.0))
    rule.load(before.state())
    for _ in range(400):
        rule.observe(Observed(drift=0.0, task=5.0))  # no longer the loss when training began
    assert rule.weight == pytest.approx(1e-3 * 1.0 / 0.4)


def test_the_state_of_an_earlier_release_is_gone_on_from():
    rule = HeldDrift(0.2, 1.0, 100)
    rule.load({"weight": 3.0, "error": 0.0, "near": True, "at_most": 0, "smoothed": [0.2, 1.0]})
    assert rule.weight == 3.0 and rule.smoothed.mean == 0.2
    rule.observe(Observed(drift=0.2, task=1.0))
    assert rule.weight == pytest.approx(3.0) and rule.bounds == pytest.approx((0.005, 50.0))


def test_a_drift_that_is_no_number_moves_nothing():
    rule = HeldDrift(0.2, 1.0, 100)
    rule.observe(Observed(drift=0.1, task=1.0))
    before = rule.state()
    rule.observe(Observed(drift=math.nan))
    assert rule.state() == before


def test_what_was_not_measured_moves_nothing():
    rule = HeldDrift(0.2, 1.0, 100)
    rule.observe(Observed(teacher_entropy=0.5, shares={"svd": 1.0}))
    assert rule.weight == 1.0


@pytest.mark.parametrize(
    ("value", "ended", "bound", "words"),
    [
        (
            5.0,
            False,
            50.0,
            r"drift_target=0.2 cannot be held.*Write drift_target=5 or more, or a smaller",
        ),
        (0.15, True, 0.005, r"drift_target=0.2 is above what this run reaches.*Write less than drift_target=0.15"),
        (0.05, True, 0.005, r"drift_target=0.2 is above what this run reaches.*less than drift_target=0.05"),
    ],
)
def test_a_budget_that_cannot_be_held_is_said_with_a_number(value, ended, bound, words):
    rule = HeldDrift(0.2, 1.0, 100)
    assert rule.finding(ended=ended) is None or ended
    for _ in range(300):
        rule.observe(Observed(drift=value, task=1.0))
    assert rule.weight == pytest.approx(bound)
    said = rule.finding(ended=ended)
    assert said is not None
    assert re.search(words, said)


def test_a_budget_that_one_step_overruns_or_the_run_does_not_reach_is_said():
    rule = HeldDrift(0.2, 1.0, 100)
    assert rule.first_step(0.1) is None
    assert "Write drift_target=0.6 or more" in rule.first_step(0.3)
    for _ in range(10):
        rule.observe(Observed(drift=0.15, task=1.0))
    assert rule.finding(ended=True) is None  # the term still acts
    for _ in range(300):
        rule.observe(Observed(drift=0.15))
    assert rule.finding(ended=False) is None
    assert "above what this run reaches" in rule.finding(ended=True)


def test_a_share_is_held_after_one_measurement():
    """A share is proportional to its weight: with the same gradients the first answer is the fixed point."""
    targets = {"consistency": 0.3, "svd": 0.05}
    rule = HeldShares(targets, FULL)
    assert rule.weights(FULL, FULL) == FULL
    unit = {"consistency": 0.2, "diversity": 0.4, "svd": 0.01}
    for _ in range(3):
        rule.observe(Observed(shares=unit))
        weights = rule.weights(FULL, FULL)
        assert weights.diversity == FULL.diversity
        for name, target in targets.items():
            assert getattr(weights, name) * unit[name] == pytest.approx(target)


def test_shares_are_smoothed_by_their_logarithms():
    rule, seen = HeldShares({"diversity": 0.1}, FULL), [0.2, 0.4, 0.1]
    for share in seen:
        rule.observe(Observed(shares={"diversity": share}))
    expected = 0.1 / math.exp(mean_of([math.log(x) for x in seen], balance.HORIZON))
    assert rule.weights(FULL, FULL).diversity == pytest.approx(expected)


def test_a_schedule_multiplies_a_balanced_weight():
    rule = HeldShares({"svd": 0.1}, FULL)
    rule.observe(Observed(shares={"svd": 0.5}))
    assert rule.weights(FULL._replace(svd=0.0), FULL).svd == 0.0
    assert rule.weights(FULL._replace(svd=FULL.svd / 4), FULL).svd == pytest.approx(0.05)


def test_a_share_out_of_reach_is_said():
    rule = HeldShares({"svd": 0.1}, FULL)
    rule.observe(Observed(shares={"svd": 0.0}))  # it did not act: nothing is known
    assert rule.finding(ended=False) is None
    assert rule.unmeasured(FULL)
    assert not rule.unmeasured(FULL._replace(svd=0.0))
    rule.observe(Observed(shares={"svd": 1e-9}))
    assert rule.weights(FULL, FULL).svd == balance.HIGHEST
    assert "balance.svd=0.1 cannot be held" in rule.finding(ended=False)


@pytest.mark.parametrize(("entropy", "weight"), [(0.0, 2.0), (0.5, 1.1), (1.0, 0.2), (1.5, 0.2), (-0.1, 2.0)])
def test_adaptive_is_the_published_formula(entropy, weight):
    assert adaptive_weight(2.0, entropy) == pytest.approx(weight)  # 0.2 + (2 - 0.2) (1 - H / ln V)


def test_adaptive_follows_the_entropy():
    rule = ByEntropy()
    assert rule.weights(FULL, FULL) == FULL
    seen = [0.5, 0.2, 0.9]
    for value in seen:
        rule.observe(Observed(teacher_entropy=value))
    expected = FULL._replace(consistency=adaptive_weight(1.0, mean_of(seen, HORIZON)))
    assert rule.weights(FULL, FULL) == pytest.approx(expected)


SETTINGS = (
    {"drift_target": 0.1, "balance": {"svd": 0.1, "diversity": 0.2}},
    {"balance": {"consistency": 0.3}},
    {"schedule": "adaptive", "balance": {"svd": 0.1}},
)


@pytest.mark.parametrize("asked", SETTINGS, ids=str)
def test_a_resumed_rule_goes_on_to_the_bit(asked):
    config = RegularizerConfig(**asked).resolved("nlg")
    generator = random.Random(1)
    measured = [
        Observed(generator.random() * 0.3, 1.0, generator.random(), {name: generator.random() for name in FULL._fields})
        for _ in range(9)
    ]
    whole, resumed = rules_of(config, 50), rules_of(config, 50)
    assert whole.keys() == {"drift_target", "balance", "schedule"} & {*asked}
    for key, rule in whole.items():
        for each in measured[:5]:
            rule.observe(each)
        resumed[key].load(json.loads(json.dumps(rule.state())))
        for each in measured[5:]:
            rule.observe(each), resumed[key].observe(each)
        assert resumed[key].weights(FULL, FULL) == rule.weights(FULL, FULL)
        assert resumed[key].state() == rule.state()
