"""`monitor: true`: evaluation measures every term for any method, and training stays what it was."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from classifiers import batch, classifier
from datasets import Dataset
from helpers import TERMS, ba_lora, counts_what_is_predicted, fresh, stock
from models import tiny_llama
from torch.nn import functional as F
from transformers import TrainingArguments

from balora_plugin import BaLoraTrainer, RegularizerConfig
from balora_plugin.training.monitored import as_it_began, monitored_teacher

pytestmark = pytest.mark.hosts

OFF = {"lambda_consistency": 0.0, "lambda_diversity": 0.0, "lambda_svd": 0.0}
MONITOR = RegularizerConfig(**OFF, monitor=True)
METHODS = {
    "ba_lora": lambda: ba_lora(tiny_llama(), regularizers=MONITOR),
    "lora": lambda: stock(tiny_llama()),
    "pissa": lambda: stock(tiny_llama(), init_lora_weights="pissa"),  # PEFT's own, which rewrites the base
    "biased": lambda: stock(tiny_llama(attention_bias=True), bias="all"),
    "full": tiny_llama,
}


def arguments(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 1,
    }
    return TrainingArguments(**{**values, **changes})


def tokens(n=8, length=9):
    ids = torch.randint(3, 90, (n, length), generator=torch.Generator().manual_seed(3))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def trainer(model, tmp_path, data=None, terms=MONITOR, **changes):
    data = tokens() if data is None else data
    return BaLoraTrainer(
        model, arguments(tmp_path, **changes), train_dataset=data, eval_dataset=data, regularizers=terms
    )


@torch.no_grad()
def logits_of(model, data):
    was = model.training
    model.eval()
    out = model(input_ids=torch.tensor(data["input_ids"])).logits.double()
    model.train(was)
    return out


def kl(before, after):
    """Mean KL(before || after) in nats a row, by the definition."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@counts_what_is_predicted
@pytest.mark.parametrize("method", METHODS)
def test_any_method_measures_its_drift_from_the_pretrained_model(method, tmp_path):
    data, model = tokens(), METHODS[method]()
    plain = logits_of(tiny_llama(**({"attention_bias": True} if method == "biased" else {})), data)
    ours = trainer(model, tmp_path)
    start = ours.evaluate()
    assert start["eval_balora/drift"] == pytest.approx(0.0, abs=1e-5)
    ours.train()
    found = ours.evaluate()
    after = logits_of(ours.model, data)
    expected = kl(plain[:, :-1], after[:, :-1])
    assert expected > 1e-3
    assert found["eval_balora/drift"] == pytest.approx(float(expected), rel=1e-3)
    entropy = -(after.softmax(-1) * after.log_softmax(-1)).sum(-1)[:, :-1].mean()
    assert found["eval_balora/entropy"] == pytest.approx(float(entropy), rel=1e-4)
    assert found["eval_balora/consistency"] == pytest.approx(float(expected), rel=1e-3)  # paper's form is the same KL
    ratios = [torch.linalg.svdvals(half[:, :-1].flatten(0, 1)) for half in after.split(4)]
    ratio = sum(-(s[:10].sum() / s.sum()) for s in ratios) / 2
    assert found["eval_balora/svd"] == pytest.approx(float(ratio), rel=1e-4)
    assert found["eval_balora/loss"] == pytest.approx(found["eval_loss"], rel=1e-5)  # all weights are 0


def test_drift_has_its_own_form_whatever_the_terms(tmp_path):
    data = tokens()
    terms = RegularizerConfig(preset="iclr2026", consistency="jsd", monitor=True)  # T = 2, entropy over the top 20
    ours = trainer(ba_lora(tiny_llama(), regularizers=terms), tmp_path, terms=None)
    ours.train()
    found = ours.evaluate()
    expected = kl(logits_of(tiny_llama(), data)[:, :-1], logits_of(ours.model, data)[:, :-1])
    assert found["eval_balora/drift"] == pytest.approx(float(expected), rel=1e-3)
    silent = copy.deepcopy(ours.ba_lora)
    silent.monitor = False
    ours.ba_lora_run.config = silent
    same = ours.evaluate()
    assert "eval_balora/drift" not in same
    for key in ("consistency", "diversity", "svd", "loss"):
        assert found[f"eval_balora/{key}"] == pytest.approx(same[f"eval_balora/{key}"], rel=1e-6)


@pytest.mark.parametrize("method", ["ba_lora", "lora", "full"])
def test_training_is_unchanged_to_the_bit(method, tmp_path):
    terms = TERMS if method != "full" else RegularizerConfig(**OFF)
    weights, logs = [], []
    for monitor in (False, True):
        kind = RegularizerConfig.from_dict({**terms.to_dict(), "monitor": monitor})
        model = ba_lora(tiny_llama(), regularizers=kind) if method == "ba_lora" else METHODS[method]()
        ours = trainer(model, tmp_path, terms=kind, eval_strategy="steps", eval_steps=1)
        ours.train()
        weights.append({name: p.detach().clone() for name, p in ours.model.named_parameters()})
        logs.append(
            [{k: v for k, v in row.items() if "loss" in row and "runtime" not in k} for row in ours.state.log_history]
        )
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert logs[0] == logs[1] and any("balora/task" in row for row in logs[0])


def test_a_copy_shares_what_does_not_train():
    model = stock(tiny_llama(), init_lora_weights="pissa")
    base = model.get_base_model()
    twin = as_it_began(base)
    theirs = dict(twin.named_parameters())
    assert {name for name, p in base.named_parameters() if theirs[name] is not p} == {
        name for name, p in base.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("full", [False, True])
def test_a_classifier_is_measured_too(full, tmp_path):
    data = Dataset.from_dict({key: value.tolist() for key, value in batch(8).items()})
    model = classifier()
    before = fresh(model).eval()
    if not full:
        model = stock(model, task_type="SEQ_CLS", modules_to_save=["score"])
    ours = trainer(model, tmp_path, data)
    ours.train()
    found = ours.evaluate()
    inputs = {key: torch.tensor(data[key]) for key in data.column_names if key != "labels"}
    with torch.no_grad():
        first, last = before(**inputs).logits.double(), ours.model.eval()(**inputs).logits.double()
    assert found["eval_balora/drift"] == pytest.approx(float(kl(first, last)), rel=1e-3)
    entropy = -(last.softmax(-1) * F.log_softmax(last, -1)).sum(-1).mean()
    assert found["eval_balora/entropy"] == pytest.approx(float(entropy), rel=1e-4)
    assert {"eval_balora/consistency", "eval_balora/diversity", "eval_balora/svd"} <= found.keys()


def test_what_acts_nowhere_is_not_warned_of(tmp_path, caplog):
    logging.getLogger("transformers").propagate = True
    one = Dataset.from_dict({key: value[:1].tolist() for key, value in batch(1).items()})
    ours = trainer(stock(classifier(), task_type="SEQ_CLS", modules_to_save=["score"]), tmp_path, one)
    with caplog.at_level(logging.WARNING):
        ours.evaluate()
    assert not [r for r in caplog.records if "cannot act" in r.getMessage()]


def test_a_resumed_classifier_keeps_the_head_it_began_with(tmp_path):
    data = Dataset.from_dict({key: value.tolist() for key, value in batch(8).items()})

    def made():
        model = stock(classifier(), task_type="SEQ_CLS", modules_to_save=["classifier"])
        changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
        return trainer(model, tmp_path, data, **changes)

    whole = made()
    whole.train()
    kept = whole.evaluate()["eval_balora/drift"]
    resumed = made()  # a new process draws another head
    torch.nn.init.normal_(resumed.model.get_base_model().classifier.original_module.weight)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.evaluate()["eval_balora/drift"] == pytest.approx(kept, rel=1e-5)


def test_without_a_teacher_to_be_had_the_run_is_refused():
    host = SimpleNamespace(model=tiny_llama(), is_fsdp_enabled=True, is_deepspeed_enabled=False)
    with pytest.raises(ValueError, match=r"monitor=True .* pass teacher_model="):
        monitored_teacher(host, host.model, MONITOR.resolved("nlg"), None)
    given = tiny_llama()
    assert monitored_teacher(host, host.model, MONITOR.resolved("nlg"), given) is given
