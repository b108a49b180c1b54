"""The GLUE study: noise, imbalance and batches by count, scores against scikit-learn, a tiny encoder through cells."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
from classifiers import classifier
from models import character_tokenizer

from studies.glue import __main__ as command
from studies.glue import data, published, report, train
from studies.glue.cells import METHODS, study_cells
from studies.glue.differences import Key, differences
from studies.glue.outcomes import AUC, BALANCED, DRIFT, MINORITY, SCORE, Outcomes

pytestmark = pytest.mark.hosts
ROWS = [{"input_ids": [3] * (1 + place % 7), "labels": int(place % 3 == 0)} for place in range(120)]
TASK = data.TaskData("sst2", ROWS, ROWS[:4], ROWS[:8])


def test_noise_turns_exactly_its_share_and_imbalance_cuts_one_class():
    noisy = data.with_noise(ROWS, 2, random.Random(1))
    assert sum(one["labels"] != other["labels"] for one, other in zip(noisy, ROWS, strict=True)) == 48
    assert TASK.minority == 1
    counts = Counter(row["labels"] for row in data.with_imbalance(ROWS, TASK.minority, random.Random(1)))
    assert counts == {0: 80, 1: 4}


def test_a_seeds_rows_are_whole_passes_in_batches_of_like_length():
    rows = data.training_rows(TASK, "clean", 1, 240, 8)
    assert Counter(map(str, rows)) == Counter(map(str, ROWS * 2))
    assert rows == data.training_rows(TASK, "clean", 1, 240, 8) != data.training_rows(TASK, "clean", 2, 240, 8)
    padding = sum(8 * max(len(r["input_ids"]) for r in rows[at : at + 8]) for at in range(0, 240, 8))
    assert padding < 1.2 * sum(len(row["input_ids"]) for row in rows)


def record(method, seed, logits, drift, setting="clean", task="cola"):
    values = {"method": method, "seed": seed, "setting": setting, "task": task}
    found = {"logits": logits, "drift": drift, "feature_drift": 0.5, "rate": 1e-3, "history": [], "seconds": 1.0}
    return {"cell": f"{setting}-{task}-{method}-s{seed}", "setting": values, "machine": "one", **found}


def outcomes_of(score, gold, logits):
    truth = {"gold": gold, "score": score, "minority": 1}
    return Outcomes([record("lora", 1, logits, [0.1] * len(gold))], ["lora"], [1], truth)


def test_weighted_scores_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    gold, logits, times = rng.integers(0, 2, 60), rng.normal(size=(60, 2)).round(1), rng.integers(0, 4, 60)
    said, margin = (logits[:, 1] - logits[:, 0] > 0).astype(int), logits[:, 1] - logits[:, 0]
    expected = {
        AUC: metrics.roc_auc_score(gold, margin, sample_weight=times),
        MINORITY: metrics.recall_score(gold, said, sample_weight=times),
        BALANCED: metrics.balanced_accuracy_score(gold, said, sample_weight=times),
    }
    for name, score in (("accuracy", metrics.accuracy_score), ("matthews", metrics.matthews_corrcoef)):
        outcomes = outcomes_of(name, gold.tolist(), logits.tolist())
        expected[SCORE] = score(gold, said, sample_weight=times)
        for metric, value in expected.items():
            assert outcomes.value(metric, times).item() == pytest.approx(100 * value, abs=1e-4), metric
    assert outcomes.value(DRIFT, times).item() == pytest.approx(0.1)


def synthetic():
    """LoRA says class 0 throughout, PiSSA is right, on two seeds."""
    gold = [0, 1] * 20
    right = [[0.0, 1.0] if label else [1.0, 0.0] for label in gold]
    runs = [
        record(method, seed, right if method == "pissa" else [[1.0, 0.0]] * 40, [0.2] * 40, setting)
        for method in ("lora", "pissa", "ba-paper")
        for seed in (1, 2)
        for setting in ("clean", "imbalance")
    ]
    truth = {"tasks": {"cola": {"gold": gold, "score": "matthews", "minority": 1, "train": 9}}, "cell": "data"}
    return runs, truth


def test_differences_are_paired_and_the_sentences_follow_from_them():
    runs, truth = synthetic()
    study = report.Study(runs, truth, repeats=20)
    found = study.found["clean"][Key("cola", SCORE, "pissa", "lora")]
    assert (found.value, found.low, found.high) == (100, 100, 100)
    assert study.found["imbalance"][Key("cola", MINORITY, "ba-paper", "pissa")].value == -100
    assert study.found["clean"][Key("cola", AUC, "pissa", "lora")].value == 50
    assert "`ba-paper` against pissa: GLUE's score is higher in 0 of 2 sets, lower in 2" in report.sentences(study)
    assert "no method's mean is a point above" not in report.sentences(study)
    assert published.agreement(0.4, found) == "same sign" and published.agreement(-0.4, found) == "the other sign"
    floor = [run for run in runs if run["setting"]["method"] != "pissa"]
    assert "nobody has learned it" in report.sentences(report.Study(floor, truth, repeats=2))


def test_a_method_without_a_partner_has_no_difference():
    runs, truth = synthetic()
    alone = Outcomes(runs[:1], ["lora", "pissa"], [1, 2], truth["tasks"]["cola"])
    found = differences("clean", {"cola": alone}, ["lora", "pissa"], 2, 5)
    assert np.isnan(found[Key("cola", SCORE, "pissa", "lora")].value)


def test_a_stopped_study_has_all_methods_of_its_first_seed():
    names = [cell.name for cell in study_cells((1, 2), ("sst2", "rte"), tuple(METHODS))]
    assert names[: len(METHODS)] == [f"clean-sst2-{method}-s1" for method in METHODS]
    assert len(names) == 2 * (3 * len(METHODS) + 5)


@pytest.fixture
def tiny(tmp_path):
    """Folder of a random BERT with a tokenizer of characters, and one of three small tasks."""
    model, files = tmp_path / "model", tmp_path / "data"
    classifier("bert", num_labels=2).save_pretrained(model)
    character_tokenizer().save_pretrained(model)
    for task in ("sst2", "cola", "rte"):
        (files / task).mkdir(parents=True)
        text = ("sentence1", "sentence2") if task == "rte" else ("sentence",)
        rows = [{**dict.fromkeys(text, "ab" * (1 + i % 3)), "label": int(i % 3 == 0)} for i in range(48)]
        for split in ("train", "validation"):
            (files / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(model), str(files)


@pytest.mark.slow
def test_cells_of_a_tiny_encoder_run_once_and_are_reported(tiny, tmp_path, monkeypatch):
    sizes = train.Sizes(
        steps=dict.fromkeys(("sst2", "cola", "rte"), 2), batch=4, length=8, rank=2, held_out=8, test=12, looks=1,
        trained_in="float32",
    )  # fmt: skip
    monkeypatch.setattr(command, "sizes_of", lambda options: sizes)
    monkeypatch.setattr(command, "TASKS", ("sst2",))
    model, files = tiny
    given = ["--model", model, "--data", files, "--output", str(tmp_path / "out"), "--seeds", "1"]
    given += ["--cells", "imbalance-sst2-*a*", "clean-sst2-full-*"]
    assert command.main(given) == 0
    runs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").iterdir()}
    methods = {run["setting"]["method"] for name, run in runs.items() if name.startswith("imbalance")}
    assert methods == {name for name in METHODS if "a" in f"{name}-s1" or "a" in name}
    assert any("balora/share_svd" in entry for entry in runs["imbalance-sst2-balance-s1"]["history"])
    assert "balora/share_svd" not in str(runs["imbalance-sst2-lora-s1"]["history"])
    assert len(runs["clean-sst2-full-s1"]["logits"]) == 12
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| sst2: ba-paper |" in text and "minus pissa" in text and "minority recall" in text
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("run again"))
    assert command.main(given) == 0
