"""What is read of runs, how they are grouped and compared, and the page that is written of them."""

from __future__ import annotations

import json
import math
import re

import pytest

from balora_plugin import RegularizerConfig
from balora_plugin.report.curves import optimisation, term_curves
from balora_plugin.report.groups import differences, grouped
from balora_plugin.report.page import page_of, write_page
from balora_plugin.report.runs import clipped, read_runs
from balora_plugin.report.updates import in_order

OFF = {"lambda_consistency": 0.0, "lambda_diversity": 0.0, "lambda_svd": 0.0}


def run(path, *, seed=0, loss=2.0, method="lora", rate=1e-3, steps=20, where="", **settings):
    """A run's directory as a Trainer with the terms leaves it."""
    folder = path / where
    folder.mkdir(parents=True)
    rows = [
        {"step": s, "loss": loss + 1 / s, "grad_norm": 4.0 / s, "learning_rate": rate * (1 - s / steps)}
        for s in range(1, steps + 1)
    ]
    if method == "ba_lora":
        rows[2] |= {"balora/share_consistency": 0.02, "balora/consistency": 0.5}
    rows.append({"step": steps, "eval_loss": loss, "eval_balora/drift": loss / 10, "eval_runtime": "0.1"})
    state = {"log_history": rows, "max_steps": steps, "global_step": steps}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    kind = RegularizerConfig(preset="iclr2026") if method == "ba_lora" else RegularizerConfig(**OFF)
    start = True if method == "lora" else "pissa"
    about = {"seed": seed, "learning_rate": rate, "max_grad_norm": 1.0, "adapter": {"start": start, "r": 4}}
    about |= {"terms": kind.resolved("nlg").to_dict(), **settings}
    seconds = {"seconds_per_step": {"teacher": 0.0, "student": 0.2, "rest": 0.1, "step": 0.3}}
    (path / "ba_lora_cost.json").write_text(json.dumps({**seconds, "run": about}))
    return str(path)


def test_a_run_is_its_last_checkpoint_or_itself(tmp_path):
    path = tmp_path / "out"
    run(path, where="checkpoint-20")
    run(tmp_path / "early", where="x", steps=5)
    (path / "checkpoint-3").mkdir()
    (path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "log_history": [{"loss": NaN}]}')
    found, same = read_runs([str(path), str(path / "checkpoint-20")])
    assert found.steps == same.steps == 20 and found.last("eval_loss") == 2.0
    assert (found.seed, found.settings["learning_rate"], found.method) == (0, 1e-3, "lora")
    assert (found.name, same.name) == ("out", "checkpoint-20")
    assert math.isnan(read_runs([str(path / "checkpoint-3")])[0].history[0]["loss"])


@pytest.mark.parametrize(
    ("key", "value"), [("global_step", "many"), ("max_steps", [3]), ("global_step", True), ("max_steps", 10**400)]
)
def test_a_count_that_is_none_is_one_line(key, value, tmp_path):
    out = tmp_path / "out"
    run(out)
    state = out / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "max_steps": 0, key: value}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(state))}: {key} is .*, not a number of steps: copy the fil"):
        read_runs([str(out)])


@pytest.mark.parametrize("value", ["x", None, [1], {"a": 1}, math.nan, math.inf, 10**400, True])
def test_rows_without_a_step_or_a_number_are_left_out(value, tmp_path):
    out = tmp_path / "out"
    run(out)
    state = out / "trainer_state.json"
    rows = [{"step": 1, "loss": 2.0}, {"step": value, "loss": 1.0}]
    state.write_text(json.dumps({**json.loads(state.read_text()), "log_history": rows}))
    assert read_runs([str(out)])[0].curve("loss") == [(1.0, 2.0)]


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["seconds_per_step"], [1], "seconds_per_step is [1], not a mapping of parts to seconds or null"),
        (["seconds_per_step", "step"], "x", "seconds_per_step is {'teacher'"),
        (["run"], [1], "run is [1], not a mapping or null"),
        (["run", "seed"], "x", "seed is 'x', not a whole number or null"),
        (["run", "seed"], math.nan, "seed is nan, not a whole number or null"),
        (["run", "max_grad_norm"], "x", "max_grad_norm is 'x', not a number or null"),
        (["run", "learning_rate"], [1], "learning_rate is [1], not a finite number or null"),
        (["run", "learning_rate"], math.nan, "learning_rate is nan, not a finite number or null"),
        (["run", "max_grad_norm"], math.nan, "max_grad_norm is nan, not a number or null"),
        (["seconds_per_step", "step"], math.inf, "seconds_per_step is {'teacher'"),
        (["run", "adapter"], "x", "adapter is 'x', not a mapping or null"),
        (["run", "terms"], [1], "terms is [1], not a mapping or null"),
        (["run", "terms", "lambda_svd"], "x", "lambda_svd='x' must be a number"),
    ],
)
def test_a_record_of_other_types_names_file_and_key(where, value, said, tmp_path):
    out = tmp_path / "out"
    run(out, method="ba_lora")
    path = out / "ba_lora_cost.json"
    values = json.loads(path.read_text())
    inner = values
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_runs([str(out)])
    assert str(path) in str(caught.value)


def test_a_log_without_a_step_has_logged_nothing(tmp_path):
    run(tmp_path / "a")
    state = tmp_path / "a" / "trainer_state.json"
    rows = [{"loss": 1.0}, {"step": 3, "epoch": 0.1}]
    state.write_text(json.dumps({**json.loads(state.read_text()), "log_history": rows}))
    with pytest.raises(ValueError, match="a has logged nothing"):
        page_of(read_runs([str(tmp_path / "a")]), "t")


def test_runs_of_two_models_are_no_seeds_of_one_group(tmp_path):
    for seed, base in enumerate(["m", "m", "other", None]):
        run(tmp_path / f"r{seed}", seed=seed)
        if base is not None:
            told = {"peft_type": "LORA", "base_model_name_or_path": base}
            (tmp_path / f"r{seed}" / "adapter_config.json").write_text(json.dumps(told))
    paths = [str(tmp_path / f"r{seed}") for seed in range(4)]
    one, two = grouped(read_runs(paths[:3]))
    assert (one.label, two.label) == ("lora, base m", "lora, base other")
    assert [each.name for each in one.runs] == ["r0", "r1"]
    (note,) = page_of(read_runs(paths[:3]), "t").notes
    assert "different models: m (r1), other (r2)." in note
    (whole,) = grouped(read_runs([paths[0], paths[1], paths[3]]))  # what says nothing of its model is not split off
    assert len(whole.runs) == 3 and not page_of(read_runs(paths[:2]), "t").notes
    ours = [tmp_path / f"r{seed}" / "ba_lora.json" for seed in (0, 2)]
    for path in ours:  # one model at two places
        path.write_text(json.dumps({"base_sha256": "a" * 64}))
    assert len(grouped(read_runs([paths[0], paths[2]]))) == 1


def test_a_trial_of_a_search_is_itself_not_the_last_one(tmp_path):
    """The search's directory has one file of costs and settings: the last trial's."""
    out = tmp_path / "out"
    run(out, rate=3.0)
    for name, rate in (("run-0", 0.1), ("run-1", 0.2)):
        run(out / name, where="checkpoint-20")
        (out / name / "ba_lora_cost.json").unlink(missing_ok=True)
        state = out / name / "checkpoint-20" / "trainer_state.json"
        state.write_text(json.dumps({**json.loads(state.read_text()), "trial_params": {"learning_rate": rate}}))
    found = read_runs([str(out / "run-0"), str(out / "run-1")])
    assert [each.settings["learning_rate"] for each in found] == [0.1, 0.2]
    assert all(each.cost == {} for each in found)


def test_where_there_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="is no directory"):
        read_runs([str(tmp_path / "no")])
    with pytest.raises(ValueError, match=r"holds no trainer_state\.json.*save_state"):
        read_runs([str(tmp_path)])


def test_text_in_a_log_is_a_number_where_it_says_one(tmp_path):
    path = tmp_path / "out"
    run(path)
    state = {"log_history": [{"step": 1, "loss": "1.5"}, {"step": 2, "loss": "n/a"}, {"step": 3, "loss": True}]}
    (path / "trainer_state.json").write_text(json.dumps(state))
    assert read_runs([str(path)])[0].curve("loss") == [(1.0, 1.5)]


def test_weights_follow_the_schedule_unless_they_were_logged(tmp_path):
    found = read_runs([run(tmp_path / "a", method="ba_lora")])[0]
    weights = dict(found.weights("svd"))
    assert weights[0.0] == 0.0 and weights[20.0] == 0.005 and found.weights("consistency")[0][1] == 0.025
    found.history.append({"step": 7, "balora/lambda_svd": 0.3})
    assert found.weights("svd") == [(7.0, 0.3)]


def test_clipped_steps_are_those_above_the_limit(tmp_path):
    found = read_runs([run(tmp_path / "a")])[0]
    assert [step for step, _ in clipped(found)] == [1, 2, 3]
    (picture,) = [each for each in optimisation(grouped([found])) if each.name == "gradient_norm"]
    assert "a: 3 of 20." in picture.caption
    free = read_runs([run(tmp_path / "b", max_grad_norm=0.0)])[0]
    assert not [*clipped(free)]


def test_runs_of_the_same_settings_are_a_group(tmp_path):
    paths = [
        run(tmp_path / f"{m}{s}{r}", method=m, seed=s, rate=r)
        for m in ("ba_lora", "lora")
        for s in (0, 1)
        for r in (1e-3, 1e-4)
    ]
    groups = grouped(read_runs(paths))
    assert [group.label for group in groups] == [
        "lora, lr 0.001",
        "lora, lr 0.0001",
        "ba_lora, lr 0.001",
        "ba_lora, lr 0.0001",
    ]
    assert [[each.seed for each in group.runs] for group in groups] == [[0, 1]] * 4


def test_runs_that_say_nothing_are_grouped_by_name(tmp_path):
    for name in ("mine-seed0", "mine-seed1", "other"):
        run(tmp_path / name)
        (tmp_path / name / "ba_lora_cost.json").unlink()
    groups = grouped(read_runs([str(tmp_path / name) for name in ("mine-seed0", "mine-seed1", "other")]))
    assert [len(group.runs) for group in groups] == [2, 1]


def test_intervals_are_students_over_pairs_of_seeds(tmp_path):
    one, other = [2.0, 2.1, 2.3], [1.8, 2.0, 1.9]
    paths = [run(tmp_path / f"a{s}", seed=s, loss=v) for s, v in enumerate(one)]
    paths += [run(tmp_path / f"b{s}", seed=s, loss=v, method="ba_lora") for s, v in enumerate(other)]
    found = differences(grouped(read_runs(paths)))[0]
    d = [b - a for a, b in zip(one, other, strict=True)]
    mean = sum(d) / 3
    half = 4.302653 * (sum((x - mean) ** 2 for x in d) / 2) ** 0.5 / 3**0.5  # t of 2 degrees of freedom
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half), rel=1e-5)
    assert found.paired and found.seeds == 3 and found.verdict == "not told apart"
    alone = differences(grouped(read_runs([paths[0], paths[3]])))[0]
    assert alone.low is None and alone.verdict == "one seed: no interval"


def test_a_diverged_group_is_neither_better_nor_worse(tmp_path):
    fine = [run(tmp_path / f"a{seed}", seed=seed) for seed in (0, 1)]
    gone = [run(tmp_path / f"b{seed}", seed=seed, loss=float("nan"), rate=0.5) for seed in (0, 1)]
    found = differences(grouped(read_runs([str(each) for each in (*fine, *gone)])))
    assert {each.verdict for each in found if each.measure == "held-out task loss"} == {"no number"}


def test_only_what_was_logged_is_drawn(tmp_path):
    plain, ours = read_runs([run(tmp_path / "a"), run(tmp_path / "b", method="ba_lora")])
    assert [*term_curves(grouped([plain]))] == []
    names = {picture.name for picture in term_curves(grouped([plain, ours]))}
    assert names == {"consistency", "share_consistency", "lambda_consistency", "lambda_diversity", "lambda_svd"}


def test_the_page_needs_nothing_from_elsewhere_and_escapes(tmp_path):
    runs = read_runs([run(tmp_path / "a"), run(tmp_path / "b", method="ba_lora")])
    path = write_page(page_of(runs, "<script>title</script>"), str(tmp_path / "look"))
    text = path.read_text()
    assert "<script" not in text and "&lt;script&gt;title" in text
    assert not re.findall(r"(?:src|href|srcset)=\"(?!data:image/png;base64,|#)", text) and "url(" not in text
    assert text.count('media="(prefers-color-scheme: dark)"') == text.count("<img") > 5
    assert 'name="viewport"' in text and "one seed: no interval" in text
    for picture in ("task_loss", "gradient_norm", "drift_against_loss", "share_consistency", "cost"):
        for file in (f"{picture}.png", f"{picture}-dark.png"):
            assert (path.parent / file).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_logged_nothing_is_said(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    with pytest.raises(ValueError, match="has logged nothing"):
        page_of(read_runs([str(tmp_path)]), "title")


def test_layers_come_in_the_models_order():
    names = [f"model.layers.{n}.mlp" for n in (10, 2, 0)] + ["model.head"]
    assert sorted(names, key=in_order) == ["model.head", *(f"model.layers.{n}.mlp" for n in (0, 2, 10))]
