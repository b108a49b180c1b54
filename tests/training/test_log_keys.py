"""Every key of the log is known with its unit, once, and reaches whatever the host reports to."""

from __future__ import annotations

import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from classifiers import batch, classifier
from datasets import Dataset
from huggingface_hub import ModelCard
from models import character_tokenizer, tiny_llama
from transformers import TrainerCallback, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig, get_ba_lora_model
from balora_plugin.adapter.saved import provenance
from balora_plugin.training.card_metrics import CardMetrics
from balora_plugin.training.log_keys import LOG_KEYS, PREFIX, WHERE, known_key

pytestmark = pytest.mark.hosts


class Reports(TrainerCallback):
    """What a tracker is given: W&B, MLflow, trackio and TensorBoard are callbacks with this method."""

    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def language_rows():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (8, 9), generator=generator)
    labels = [[-100] * (n % 5) + row[n % 5 :] for n, row in enumerate(ids.tolist())]  # batches of other counts
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels})


def classified_rows():
    found = batch(n=8)
    return Dataset.from_dict({key: value.tolist() for key, value in found.items()})


RUNS = {
    "language model": (
        tiny_llama,
        language_rows,
        {
            "drift_target": 0.05,
            "balance": {"svd": 0.1},
            "lambda_diversity": 0.02,
            "temperature": 2.0,
            "anchor_data": ["a text", "another"],
        },
        "CAUSAL_LM",
    ),
    "classifier": (
        lambda: classifier(num_labels=3),
        classified_rows,
        {"lambda_consistency": 0.1, "lambda_diversity": 0.1, "lambda_svd": 0.1, "svd_top_k": 1},
        "SEQ_CLS",
    ),
}


def trained(name, output, report_to=()):
    """(the trainer after a run in which every key is logged, what a tracker was given)."""
    model, rows, terms, task = RUNS[name]
    reports = Reports()
    arguments = TrainingArguments(
        str(output),
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=list(report_to),
        use_cpu=True,
        seed=1,
    )
    trainer = BaLoraTrainer(
        model(),
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(),
        processing_class=character_tokenizer(),
        callbacks=[reports],
        peft_config=BaLoraConfig(
            r=2,
            lora_alpha=2,
            target_modules="all-linear",
            task_type=task,
            regularizers=RegularizerConfig(**terms, share_interval=1, monitor=True),
        ),
    )
    trainer.train()
    return trainer, reports.rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {name: trained(name, tmp_path_factory.mktemp("run")) for name in RUNS}


def ours(rows):
    return {key for row in rows for key in row if PREFIX in key}


def test_a_run_logs_what_is_known_and_nothing_else(runs):
    logged = set().union(*(ours(rows) for _, rows in runs.values()))
    assert [key for key in logged if known_key(key) is None] == []
    assert {key.rpartition(PREFIX)[2] for key in logged} == set(LOG_KEYS)
    for key in logged:
        where = known_key(key).where
        assert where in ("both", "eval") if key.startswith("eval_") else where != "eval", key


def test_every_key_has_a_meaning_a_sign_and_a_healthy_range():
    assert known_key("loss") is known_key("balora/loss_of_mine") is None
    for name, key in LOG_KEYS.items():
        assert key.meaning and key.sign and key.healthy and key.where in WHERE, name


@pytest.mark.parametrize("name", RUNS)
def test_no_number_is_logged_under_two_names(name, runs):
    """Two keys that agree in every row would be one. (A KL at temperature 1 would be the drift, by its definition.)"""
    rows = runs[name][0].state.log_history
    columns = {}
    for number, row in enumerate(rows):
        for key, value in row.items():
            if isinstance(value, float) and key not in ("epoch", "learning_rate"):
                columns.setdefault(key, {})[number] = value
    same = [
        (one, other)
        for one, other in itertools.combinations(columns, 2)
        if columns[one] == columns[other] and any(columns[one].values())
    ]
    assert same == []


@pytest.mark.parametrize("name", RUNS)
def test_a_tracker_is_given_every_key(name, runs):
    trainer, rows = runs[name]
    assert ours(rows) == ours(trainer.state.log_history)
    (last,) = (row for row in rows if "train_runtime" in row)
    ends = {f"{PREFIX}{key}" for key, known in LOG_KEYS.items() if known.where == "end"}
    counted = "tokens" if name == "language model" else "samples"
    other = {"tokens", "samples"} - {counted}
    assert ends - ours([last]) == {f"{PREFIX}{each}_per_second" for each in other}
    assert ends & ours(row for row in rows if row is not last) == set()


@pytest.mark.parametrize("name", RUNS)
def test_the_cost_is_that_of_the_parts(name, runs):
    trainer, rows = runs[name]
    last = next(row for row in rows if "train_runtime" in row)
    report = json.loads(Path(trainer.args.output_dir, "ba_lora_cost.json").read_text())
    assert report["overhead"] == last[f"{PREFIX}overhead"] > 0
    assert report["seconds_per_step"]["step"] == last[f"{PREFIX}seconds_per_step"]
    # 4 steps of 2 micro-batches of 2 rows are the 8 rows twice
    tokens = sum(label != -100 for row in language_rows()["labels"] for label in row[1:])
    counted = 16 if name == "classifier" else 2 * tokens
    speed = counted / 4 / report["seconds_per_step"]["step"]
    kind = "samples" if name == "classifier" else "tokens"
    assert report["per_second"] == last[f"{PREFIX}{kind}_per_second"] == pytest.approx(speed)


@pytest.mark.parametrize("name", RUNS)
def test_the_card_has_the_tag_the_citation_and_what_was_measured_last(name, runs, tmp_path):
    trainer, rows = runs[name]
    trainer.save_model(str(tmp_path))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags.count("ba-lora") == 1 and card.text.count("@inproceedings{chang2026balora,") == 1
    last = next(row for row in reversed(rows) if "eval_loss" in row)
    shown = dict(re.findall(r"^\| `(\S+)` \| (\S+) \|$", card.text.partition("Measured last")[2], re.M))
    assert shown["step"] == "4" and float(shown["eval_loss"]) == pytest.approx(last["eval_loss"], rel=1e-5)
    for key in ("eval_balora/task", "eval_balora/drift", "eval_balora/consistency"):
        assert float(shown[key]) == pytest.approx(last[key], rel=1e-5)
    assert "balora/task" in shown and not any("share" in key or "second" in key for key in shown)


def test_the_card_of_a_resumed_run_has_what_the_run_before_measured():
    class State:
        log_history: ClassVar = [{"loss": 2.0, "step": 1}, {"eval_loss": 1.5, "step": 2}, {"loss": 1.0, "step": 3}]
        global_step = 4

    model = get_ba_lora_model(tiny_llama(), BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    provenance.prepare(model, "the base")
    found = provenance.known(model)
    found.measured["eval_of_an_earlier_training"] = 1.0
    metrics = CardMetrics(SimpleNamespace(wrapped=model))
    metrics.on_train_begin(None, State, None)
    assert found.measured == {"eval_loss": 1.5, "loss": 1.0, "step": 3.0}
    metrics.on_log(None, State, None, logs={"loss": 0.5, "learning_rate": 0.1})
    assert found.measured == {"eval_loss": 1.5, "loss": 0.5, "step": 4.0}


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_holds_every_key(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    _, rows = trained("language model", tmp_path, ["tensorboard"])
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    tags = (re.sub("^eval/", "eval_", re.sub("^train/", "", tag)) for tag in board.Tags()["scalars"])
    assert ours([dict.fromkeys(tags)]) == ours(rows)
