"""balora glue: all nine tasks end to end on a small local GLUE, GLUE-X with its label maps, recipes and reports."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from classifiers import batch, classifier
from models import character_tokenizer
from transformers import TrainingArguments

from balora_plugin.commands import main
from balora_plugin.glue import report
from balora_plugin.glue.metrics import score
from balora_plugin.glue.recipe import read_recipe, recipe_file
from balora_plugin.glue.run import jobs_of, run_job
from balora_plugin.glue.tasks import GLUE_X, LABELS, METHODS, RECIPES, TASKS, comparable, label_of, positive_class

# the text columns as GLUE names them
COLUMNS = {
    "mnli": ("premise", "hypothesis"),
    "sst2": ("sentence",),
    "cola": ("sentence",),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
}


def rows(columns, labels, n):
    texts = [{column: f"{column} {i}: {'yes' if i % 2 else 'no'}" for column in columns} for i in range(n)]
    return [{**text, "label": labels[i % len(labels)]} for i, text in enumerate(texts)]


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in values))


@pytest.fixture(autouse=True)
def _one_thread(_seed):
    torch.set_num_threads(1)  # two would wait for each other more than they compute on models this small


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A tiny BERT, GLUE's nine tasks and GLUE-X's sets as JSONL, and a recipe of two steps."""
    path = tmp_path_factory.mktemp("glue")
    classifier("bert").bert.save_pretrained(path / "bert")
    character_tokenizer().save_pretrained(path / "bert")
    for name, task in TASKS.items():
        labels = [0.0, 2.5, 5.0] if task.num_labels == 1 else list(range(task.num_labels))
        columns = COLUMNS.get(name, ("sentence1", "sentence2"))
        for split in ("train", *task.splits):
            write(path / "data" / name / f"{split}.jsonl", rows(columns, labels, 8))
    for sets in GLUE_X.values():
        for name, kind in sets.items():
            single = kind in ("sentiment", "acceptability")
            labels = [1.0, 4.5] if kind == "similarity" else [words[-1] for words in LABELS[kind]]  # as words
            columns = ("sentence",) if single else ("sentence1", "sentence2")
            write(path / "glue-x" / f"{name}.jsonl", [*rows(columns, labels, 6), *rows(columns, [-1], 1)])
    recipe = {
        "model": str(path / "bert"),
        "seeds": [1, 2],
        "regularizers": {"preset": "iclr2026"},
        "defaults": {"r": 2, "lora_alpha": 2, "batch_size": 4, "max_steps": 2, "max_length": 32},
        "tasks": {"rte": {"learning_rates": [1e-3, 1e-2]}},
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


def test_all_nine_tasks(local, tmp_path, capsys):
    pytest.importorskip("sklearn")
    arguments = ["glue", "--recipe", str(local / "recipe.yaml"), "--data", str(local / "data"), "--seeds", "1"]
    arguments += ["--output", str(tmp_path), "--glue-x", str(local / "glue-x")]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    entries = {entry["task"]: entry for entry in json.loads((tmp_path / "results.json").read_text())}
    assert set(entries) == set(TASKS)
    assert (tmp_path / "results.md").read_text() == table
    for name, task in TASKS.items():
        assert set(entries[name]["scores"]) == set(task.splits)
        assert set(entries[name]["scores"][task.splits[0]]) == set(task.scores)
        assert set(entries[name]["glue_x"]) == set(GLUE_X.get(name, {}))
    assert entries["rte"]["learning_rates_tried"] == [1e-3, 1e-2] and "| average of 9 | ba_lora |" in table
    run = json.loads(next((tmp_path / "runs").glob("mnli-*.json")).read_text())
    assert run["steps"] == 2 and run["glue_x"]["snli"]["samples"] == 6 and run["glue_x"]["snli"]["without_label"] == 1
    assert run["job"]["regularizers"]["preset"] == "iclr2026"


def test_methods_seeds_and_runs_that_are_not_repeated(local, tmp_path, capsys):
    pytest.importorskip("sklearn")
    arguments = ["glue", "--recipe", str(local / "recipe.yaml"), "--data", str(local / "data"), "--task", "wnli"]
    arguments += ["--output", str(tmp_path), "--method", *METHODS, "--keep", "--limit", "6"]
    assert main(arguments) == 0
    entries = json.loads((tmp_path / "results.json").read_text())
    assert [entry["method"] for entry in entries] == sorted(METHODS)
    for entry in entries:
        assert entry["seeds"] == [1, 2] and entry["scores"]["validation"]["accuracy"]["std"] is not None
    (adapter,) = [p for p in (tmp_path / "adapters").iterdir() if p.name.startswith("wnli-ba_lora-0.0003-1-")]
    assert (adapter / "ba_lora_head.safetensors").exists()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == files


def test_a_run_is_repeated_where_more_is_asked_of_it_or_its_data_have_changed(local, tmp_path, capsys, monkeypatch):
    """The trainings are counted; a second call with what the record holds makes none."""
    pytest.importorskip("sklearn")
    for name, source in (("data/sst2", "data/sst2"), ("x", "glue-x")):
        shutil.copytree(local / source, tmp_path / name)
    runs, drawn = [], []

    def counted(*args, **how):
        runs.append(how)
        return run_job(*args, **how)

    def figure(methods, path, title):
        drawn.append([snapshot.step for snapshot in methods["ba_lora"]])
        return {}

    monkeypatch.setattr("balora_plugin.glue.run.run_job", counted)
    monkeypatch.setattr("balora_plugin.glue.separation.check_matplotlib", lambda: None)
    monkeypatch.setattr("balora_plugin.glue.separation.figure", figure)
    base = ["glue", "--recipe", str(local / "recipe.yaml"), "--data", str(tmp_path / "data"), "--task", "sst2"]
    base += ["--seeds", "1", "--output", str(tmp_path / "out")]
    more = [*base, "--glue-x", str(tmp_path / "x"), "--keep"]

    def trainings(arguments):
        before = len(runs)
        assert main(arguments) == 0
        return len(runs) - before

    def entry():
        return json.loads((tmp_path / "out" / "results.json").read_text())[0]

    assert trainings(base) == 1 and not entry()["glue_x"]
    assert trainings(more) == 1 and set(entry()["glue_x"]) == set(GLUE_X["sst2"])
    (adapter,) = (tmp_path / "out" / "adapters").iterdir()
    assert trainings(more) == trainings(base) == 0
    shutil.rmtree(adapter)
    assert trainings(more) == 1
    write(tmp_path / "x" / "imdb.jsonl", rows(("sentence",), [1], 4))
    assert trainings(more) == 1
    assert trainings([*base, "--separation", "0"]) == 1 and trainings([*base, "--separation", "1"]) == 1
    assert trainings([*more, "--separation", "0"]) == 0  # nothing that was asked before is lost
    assert drawn == [[0, 2], [1, 2], [0, 2]]
    old = entry()["scores"]
    write(tmp_path / "data" / "sst2" / "validation.jsonl", rows(("sentence",), [1, 0], 7))
    assert trainings(base) == 1 and entry()["scores"] != old and not entry()["glue_x"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--data", "nowhere"], "--data nowhere is no directory"),
        (["--glue-x", "nowhere"], "--glue-x nowhere is no directory"),
        (["--model", "nowhere"], "model nowhere has no tokenizer"),
    ],
)
def test_a_wrong_command_is_one_line(changes, message, local, tmp_path, capsys):
    pytest.importorskip("sklearn")
    arguments = ["glue", "--recipe", str(local / "recipe.yaml"), "--data", str(local / "data"), "--task", "rte"]
    assert main([*arguments, "--output", str(tmp_path), *changes]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1 and message in error[0]


@pytest.mark.parametrize("method", METHODS)
def test_several_gpus_in_one_process_are_refused_for_every_method(method, local, tmp_path, monkeypatch):
    """DataParallel would multiply the batch of full fine-tuning, the baseline, alone."""
    recipe = read_recipe(str(local / "recipe.yaml"))
    (job,) = jobs_of(recipe, [TASKS["wnli"]], [method], [1], 0)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"n_gpu=2: nn\.DataParallel is not supported"):
        run_job(job, TASKS["wnli"], data=str(local / "data"), glue_x=None, keep=str(tmp_path))


def test_a_recipe_is_a_file_or_one_of_ours(tmp_path, monkeypatch):
    here = Path(recipe_file("roberta-large"))
    assert {path.stem for path in here.parent.glob("*.yaml")} == set(RECIPES)
    with pytest.raises(ValueError, match=r"--recipe roberta is no file: name one, or one of bert-large, "):
        recipe_file("roberta")
    monkeypatch.chdir(tmp_path)
    Path("roberta-large").write_text("model: mine")
    assert recipe_file("roberta-large") == "roberta-large"


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_recipes(name):
    recipe = read_recipe(recipe_file(name))
    assert recipe.seeds == (42, 1024, 2024) and recipe.regularizers.resolved().lambda_diversity == 4e-4
    for task in TASKS:
        assert recipe.of(task).epochs >= 5 and recipe.of(task).scheduler == "linear"
    if name == "roberta-large":
        sst2 = recipe.of("sst2")
        assert (sst2.epochs, sst2.batch_size, sst2.learning_rates, sst2.lora_alpha) == (10, 32, (2e-4,), 16)
        assert recipe.of("cola").epochs == 20 and len(recipe.of("cola").learning_rates) == 8
    if name == "deberta-v3-base":
        assert (recipe.of("rte").epochs, recipe.of("rte").learning_rates) == (50, (1e-4,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "m", "epochs": 3}, "'epochs' is not a setting"),
        ({"defaults": {}}, "model: None must be a model's name"),
        ({"model": "m", "tasks": {"ax": {}}}, "'ax' is not a task of GLUE"),
        ({"model": "m", "defaults": {"learning_rates": ["1e-4"]}}, r"YAML reads 1e-4 as text"),
        ({"model": "m", "defaults": {"batch_size": 0}}, "batch_size: 0 must be a whole number"),
        ({"model": "m", "defaults": {"epochs": "10"}}, "epochs: '10' must be a number above 0"),
        ({"model": "m", "defaults": {"warmup_ratio": 6}}, "warmup_ratio: 6 must be a number from 0 to below 1"),
        ({"model": "m", "defaults": {"max_steps": 0}}, "max_steps: 0 must be a whole number >= 1, or -1"),
        ({"model": "m", "defaults": {"lora_dropout": 1}}, "lora_dropout: 1 must be a number from 0 to below 1"),
        ({"model": "m", "tasks": {"rte": {"lora_alpha": -8}}}, "lora_alpha: -8 must be a number above 0"),
        ({"model": "m", "defaults": {"weight_decay": float("nan")}}, "weight_decay: nan must be a number >= 0"),
        ({"model": "m", "regularizers": {"svd_layout": "flattened"}}, "svd_layout='flattened' with task='nlu'"),
    ],
)
def test_a_wrong_recipe_is_refused(values, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError) as caught:
        read_recipe(str(tmp_path / "recipe.yaml"))
    assert message in str(caught.value)


def test_labels_go_from_one_set_to_another():
    # a three-way set with a two-way model, the reverse, and paraphrases
    assert comparable([0, 1, 1], [0, 1, 2], "nli2", "nli3") == ([0, 1, 1], [0, 1, 1])
    assert comparable([0, 1, 2], [0, 1, 1], "nli3", "nli2") == ([0, 1, 1], [0, 1, 1])
    assert comparable([0, 1], [1, 0], "nli2", "paraphrase") == ([1, 0], [1, 0])
    assert comparable([1, 0], [0, 1], "paraphrase", "nli2") == ([0, 1], [0, 1])
    assert comparable([2, 1], [0, 1], "nli3", "nli3") == ([2, 1], [0, 1])
    with pytest.raises(ValueError, match="says nothing"):
        comparable([0], [0], "sentiment", "nli2")
    assert label_of("Non-Entailment", "nli2") == 1 and label_of("neutral", "nli3") == 1
    assert label_of("neutral", "nli2") == 1 and label_of("-", "nli3") is None and label_of(4.5, "similarity") == 4.5
    for value, kind in ((3, "nli3"), ("maybe", "nli3"), (True, "nli2"), (0.5, "sentiment")):
        with pytest.raises(ValueError, match="is none of"):
            label_of(value, kind)


def test_scores():
    pytest.importorskip("sklearn")
    names, both = ("accuracy", "f1", "matthews"), ("pearson", "spearman")
    expected = {"accuracy": 75, "f1": 200 / 3, "matthews": 57.735027}
    assert score(names, [1, 1, 0, 0], [1, 0, 0, 0]) == pytest.approx(expected)
    assert score(both, [1, 2, 3], [1, 2, 9]) == pytest.approx({"pearson": 91.766294, "spearman": 100})
    assert score(("pearson", "spearman", "matthews"), [1, 1], [0, 1]) == {"pearson": 0, "spearman": 0, "matthews": 0}
    with pytest.raises(ValueError, match="no samples"):
        score(names, [], [])


def test_answers_score_alike_as_paraphrases_and_as_entailment():
    """MRPC's model on HANS: F1 of class 1 would there be that of what does not follow."""
    pytest.importorskip("sklearn")
    answers, meant = [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]  # of a paraphrase model: 1 is yes
    found = {}
    for data in ("paraphrase", "nli2"):
        gold = meant if data == "paraphrase" else [1 - label for label in meant]
        found[data] = score(
            TASKS["mrpc"].scores, *comparable(answers, gold, "paraphrase", data), positive=positive_class(data)
        )
    assert found["nli2"] == found["paraphrase"] == pytest.approx({"accuracy": 500 / 6, "f1": 800 / 9})
    assert positive_class("nli3") == positive_class("qnli") == 0 and positive_class("sentiment") == 1


def test_the_best_rate_is_chosen_over_seeds():
    def record(rate, seed, value):
        job = {"task": "cola", "method": "lora", "model": "m", "learning_rate": rate, "seed": seed}
        return {"job": job, "scores": {"validation": {"matthews": value}}, "glue_x": {}}

    (entry,) = report.summary([record(1e-3, 1, 90), record(1e-3, 2, 10), record(1e-4, 2, 62), record(1e-4, 1, 60)])
    assert entry["learning_rate"] == 1e-4 and entry["seeds"] == [1, 2]
    assert entry["scores"]["validation"]["matthews"] == {"mean": 61, "std": pytest.approx(2**0.5)}
    assert "| cola | lora | matthews | 61.00 ± 1.41 | 2 | 0.0001 |" in report.markdown([entry])


def test_separation(local, tmp_path, capsys):
    """Features of the last layer after chosen steps of two methods, with silhouettes, as PNG."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    arguments = ["glue", "--recipe", str(local / "recipe.yaml"), "--data", str(local / "data"), "--task", "sst2"]
    arguments += ["--output", str(tmp_path), "--seeds", "1", "--method", "lora", "ba_lora", "--separation", "0", "1"]
    assert main(arguments) == 0
    (picture,) = (tmp_path / "separation").glob("*.png")
    assert picture.name == "sst2-0.0003-1.png" and picture.read_bytes().startswith(b"\x89PNG")
    scores = json.loads(picture.with_suffix(".json").read_text())["silhouette"]
    assert list(scores) == ["lora", "ba_lora"] and list(scores["lora"]) == ["0", "1", "2"]
    assert scores["lora"]["0"] == scores["ba_lora"]["0"] != scores["ba_lora"]["2"]  # one pre-trained model


def test_features_are_taken_at_rest_and_disturb_nothing(local):
    """The tap's rows are the head's input without dropout; training goes on as without it."""
    from datasets import Dataset
    from transformers import DataCollatorWithPadding

    from balora_plugin.glue.separation import FeatureTap, load_snapshots, save_snapshots, silhouette

    pytest.importorskip("sklearn")
    model = classifier("llama", dropout=0.5).train()
    data = batch(6)
    table = {
        key: [row[: int(n)].tolist() for row, n in zip(data[key], data["attention_mask"].sum(1), strict=True)]
        for key in ("input_ids", "attention_mask")
    }
    rows = Dataset.from_dict({**table, "labels": data["labels"].tolist()})
    collate = DataCollatorWithPadding(character_tokenizer())
    tap = FeatureTap([0], rows, collate)
    args = SimpleNamespace(per_device_eval_batch_size=4)
    before = torch.get_rng_state()
    tap.on_train_begin(args, None, None, model=model)
    assert torch.equal(torch.get_rng_state(), before) and all(module.training for module in model.modules())
    logits = model.eval()(**{k: v for k, v in data.items() if k != "labels"}).logits
    torch.testing.assert_close(model.score(torch.tensor(tap.found[0].rows)), logits)
    save_snapshots(str(local / "taps.npz"), list(tap.found.values()))
    (again,) = load_snapshots(str(local / "taps.npz"))
    assert again.step == 0 and (again.rows == tap.found[0].rows).all()
    two = np.arange(6) % 2
    assert silhouette(dataclasses.replace(again, rows=np.eye(2)[two], labels=two)) == pytest.approx(1.0)
    assert silhouette(dataclasses.replace(again, labels=two)) < 0.9
    assert np.isnan(silhouette(dataclasses.replace(again, labels=np.zeros(6, dtype=int))))
