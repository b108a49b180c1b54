"""Weights that set themselves, in training: what they read, where they are logged, resumed and cached."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from classifiers import classifier
from datasets import Dataset
from models import tiny_llama
from safetensors.torch import load_file
from transformers import DataCollatorForLanguageModeling, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from balora_plugin.checkpoint.manifest import MANIFEST_FILE
from balora_plugin.config import TERMS
from balora_plugin.regularizers import consistency_rows, entropy_rows
from balora_plugin.training.setting_weights import STATE_KEY
from balora_plugin.weights.adaptive import adaptive_weight
from balora_plugin.weights.drift import HeldDrift
from balora_plugin.weights.observed import Observed

from .nlu_training import build as build_classifier

pytestmark = pytest.mark.hosts

TEXTS = [f"The number {i} comes before {i + 1}" + " and so on" * (i % 3) for i in range(12)]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def build(tmp_path, tokenizer, terms, **changes):
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }
    rows = Dataset.from_list([tokenizer(text) for text in TEXTS])
    return BaLoraTrainer(
        model=tiny_llama(),
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
        peft_config=BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", regularizers=terms),
    )


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row and "loss" in row]


def replayed(rows, target, start, steps):
    """The weight of each step, from what those before have logged; a step that met no teacher has no drift."""
    rule, found = HeldDrift(target, start, steps), []
    for row in rows:
        found.append(rule.weight)
        rule.observe(Observed(drift=row.get("balora/drift"), task=row["balora/task"]))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"consistency": "jsd", "temperature": 2.0},
        {"preset": "iclr2026", "lambda_consistency": 0.3},
        {"teacher_interval": 8},  # of two rows and two micro-batches a step: the teacher is met in every other step
    ],
    ids=str,
)
def test_a_weight_follows_the_drift_of_the_steps_before(settings, tmp_path, tokenizer):
    terms = RegularizerConfig(drift_target=0.01, **settings)
    trainer = build(tmp_path, tokenizer, terms, gradient_accumulation_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    drifts = [row.get("balora/drift") for row in rows]  # None where no row of a step met the teacher
    weights = replayed(rows, 0.01, terms.lambda_consistency or 1.0, 6)
    assert [row["balora/lambda_consistency"] for row in rows] == pytest.approx(weights, rel=1e-6)
    assert (None in drifts) == (terms.teacher_interval == 8)
    drifts = [value for value in drifts if value is not None]
    assert drifts[0] == pytest.approx(0.0, abs=1e-6)
    assert drifts[-1] > 1e-4
    assert "drift_target" in trainer.ba_lora_run.warn.said  # a rate of 0.01 goes past it at once


def test_the_logged_drift_is_that_of_dense_logits(tmp_path, tokenizer):
    """In evaluation too, which keeps the weights that are written."""
    terms = RegularizerConfig(preset="iclr2026", drift_target=0.05)
    trainer = build(tmp_path, tokenizer, terms)
    trainer.train()
    found = trainer.evaluate()
    model, total, count = trainer.model.eval(), 0.0, 0
    for batch in trainer.get_eval_dataloader():
        with torch.no_grad():
            student = model(**batch).logits
            with model.disable_adapter():
                teacher = model(**batch).logits
        counted = batch["labels"][:, 1:] != -100
        total += consistency_rows(student[:, :-1][counted], teacher[:, :-1][counted]).sum().item()
        count += int(counted.sum())
    assert found["eval_balora/drift"] == pytest.approx(total / count, rel=1e-4)
    full = trainer.ba_lora
    weighted = sum(getattr(full, f"lambda_{name}") * found[f"eval_balora/{name}"] for name in TERMS)
    assert found["eval_balora/loss"] == pytest.approx(found["eval_balora/task"] + weighted, rel=1e-5)
    assert full.lambda_consistency == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"drift_target": 0.02, "temperature": 2.0, "balance": {"svd": 0.1}, "teacher_interval": 2},
        {"schedule": "adaptive", "balance": {"diversity": 0.1}},
    ],
    ids=str,
)
def test_a_resumed_run_is_the_same_to_the_bit(settings, tmp_path, tokenizer):
    terms = RegularizerConfig(share_interval=2, **settings)
    options = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3}
    whole = build(tmp_path, tokenizer, terms, **options)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert "trainer_state.json" in (checkpoint / MANIFEST_FILE).read_text()
    kept = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"][STATE_KEY]
    assert kept.keys() == {"drift_target", "balance", "schedule"} & settings.keys()
    again = build(tmp_path / "again", tokenizer, terms, restore_callback_states_from_checkpoint=False, **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name in TERMS:
        key = f"balora/lambda_{name}"
        assert history(again, key) == history(whole, key)
        assert len(set(history(whole, key))) > 2 or key[7:] not in str(kept)
    assert again.state.stateful_callbacks[STATE_KEY] == whole.state.stateful_callbacks[STATE_KEY]
    files = [tmp_path / part / "checkpoint-6" / "adapter_model.safetensors" for part in ("out", "again/out")]
    ours, theirs = map(load_file, files)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_without_the_rule_is_said(tmp_path, tokenizer):
    options = {"save_strategy": "steps", "save_steps": 3}
    build(tmp_path, tokenizer, RegularizerConfig(), **options).train()
    other = build(tmp_path / "again", tokenizer, RegularizerConfig(drift_target=0.5), **options)
    other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert "weights_anew" in other.ba_lora_run.warn.said


@pytest.mark.parametrize("settings", [{"drift_target": 0.02}, {"schedule": "adaptive"}], ids=str)
def test_a_cached_teacher_gives_the_weights_of_a_live_one(settings, tmp_path, tokenizer):
    found = []
    for top_k in (None, 0, 88):
        cached = {} if top_k is None else {"teacher_cache": tmp_path / f"cache{top_k}", "teacher_cache_top_k": top_k}
        trainer = build(tmp_path / str(top_k), tokenizer, RegularizerConfig(**settings, **cached), max_steps=4)
        trainer.train()
        found.append(history(trainer, "balora/lambda_consistency"))
    live, states, top = found
    assert len(set(live)) == 4
    assert states == pytest.approx(live, rel=0.02)  # rounded to bfloat16
    assert top == pytest.approx(live, rel=0.2)  # of 89 buckets


def test_adaptive_is_the_formula_of_the_teachers_entropy(tmp_path, tokenizer):
    terms = RegularizerConfig(schedule="adaptive", lambda_consistency=0.5, consistency="mse")
    trainer = build(tmp_path, tokenizer, terms, max_steps=2, per_device_train_batch_size=12)
    trainer.train()
    model, batch = trainer.model, next(iter(trainer.get_train_dataloader()))
    with torch.no_grad(), model.disable_adapter():
        logits = model(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100]
    entropy = entropy_rows(logits).mean().item() / math.log(logits.shape[-1])
    assert history(trainer, "balora/lambda_consistency") == pytest.approx(
        [0.5, adaptive_weight(0.5, entropy)], rel=1e-5
    )


BALANCE = {"consistency": 0.3, "diversity": 0.05, "svd": 0.05}


def test_balance_holds_each_share(tmp_path, tokenizer):
    terms = RegularizerConfig(balance=BALANCE, share_interval=1)
    trainer = build(tmp_path, tokenizer, terms, max_steps=24, learning_rate=1e-3)
    trainer.train()
    for name, target in BALANCE.items():
        shares = history(trainer, f"balora/share_{name}")
        assert len(shares) == 23  # from step 1 on
        late = shares[8:]
        assert sum(late) / len(late) == pytest.approx(target, rel=0.25), name
        assert 0.2 * target < min(late) <= max(late) < 5 * target
    assert trainer.ba_lora_run.warn.said <= {"svd_clamped"}


def test_balance_measures_at_powers_of_two_and_where_a_schedule_begins(tmp_path, tokenizer):
    terms = RegularizerConfig(preset="iclr2026", balance=BALANCE)
    trainer = build(tmp_path, tokenizer, terms, max_steps=20, learning_rate=1e-3)
    trainer.train()
    found = {
        name: [row["step"] - 1 for row in trainer.state.log_history if f"balora/share_{name}" in row] for name in TERMS
    }
    # the schedule lets the other two in after step 4; 10 is where shares are judged, 1 and 2, 4 ... the powers
    assert found["consistency"] == [1, 2, 4, 5, 8, 10, 16]
    assert found["svd"] == found["diversity"] == [5, 8, 10, 16]
    assert set(history(trainer, "balora/lambda_svd")[:5]) == {0.0}


@pytest.mark.parametrize(
    "settings", [{"drift_target": 0.05, "balance": {"svd": 0.1}}, {"schedule": "adaptive"}], ids=str
)
def test_a_classifier(settings, tmp_path):
    terms = RegularizerConfig(**settings, share_interval=1, svd_norm="nuclear", head_warmup_steps=1)
    trainer = build_classifier(tmp_path, terms=terms, max_steps=5)
    trainer.train()
    weights = history(trainer, "balora/lambda_consistency")
    assert weights[0] == weights[1] == (1.0 if terms.drift_target else 1e-4)  # the head alone at first: no teacher
    assert len(set(weights[1:])) == 4
    if terms.drift_target is not None:
        rows = [row for row in trainer.state.log_history if "balora/drift" in row]
        assert weights[1:] == pytest.approx(replayed(rows, 0.05, 1.0, 5), rel=1e-6)
        assert trainer.ba_lora.consistency == "kl"


def test_a_regression_has_no_entropy(tmp_path):
    terms = RegularizerConfig(schedule="adaptive")
    with pytest.raises(ValueError, match=re.escape("schedule='adaptive' weighs by the entropy")):
        build_classifier(tmp_path, model=classifier(num_labels=1), terms=terms)
