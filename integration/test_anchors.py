"""`anchor_data` in the trainers: its own mean however a batch is cut, exact again after a resume, and what it costs."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from datasets import Dataset
from helpers import fresh, logits
from models import tiny_llama
from transformers import TrainerCallback

from balora_plugin import BaLoraTrainer, RegularizerConfig, regularizers
from balora_plugin.pretrained.switch import TeacherSwitch
from balora_plugin.training import anchors as run_anchors

from .test_teacher_cache import Passes
from .test_trl import adapter, build, history, without_inductor  # noqa: F401

TEXTS = [{"text": f"Anchor {i} says little" + " at all" * (i % 4)} for i in range(20)]
KEYS = ("loss", "grad_norm", "balora/task", "balora/consistency", "balora/loss", "balora/anchor_consistency")


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch):
    """The probe of packing has tests of its own; here passes are counted."""
    monkeypatch.setattr("balora_plugin.training.packing_probe.PackingProbe.look", lambda probe, inputs: None)


def terms(**changes):
    values = {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.0, "anchor_data": TEXTS}
    return RegularizerConfig(**{**values, "anchor_fraction": 0.5, **changes})


def trained(tmp_path, tokenizer, values=None, **changes):
    changes.setdefault("peft_config", adapter(regularizers=terms(**(values or {}))))
    trainer = build(tmp_path, tokenizer, **changes)
    trainer.train()
    return trainer


class Gradients(TrainerCallback):
    """Those of the optimizer step `at`."""

    def __init__(self, at=1):
        self.at, self.found = at, None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at:
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def dense_anchors(model, batch):
    """The mean over the anchors' tokens, from logits of each alone."""
    total, tokens = 0.0, 0
    for ids in batch:
        ids = torch.from_numpy(ids).unsqueeze(0)
        hidden = model.get_base_model().model(input_ids=ids).last_hidden_state[0]
        with TeacherSwitch(model.get_base_model()).off():
            before = model.get_base_model().model(input_ids=ids).last_hidden_state[0].to(torch.bfloat16).to(hidden)
        head = model.get_base_model().lm_head.weight
        total = total + regularizers.consistency(hidden @ head.T, before @ head.T) * ids.numel()
        tokens += ids.numel()
    return total / tokens


def test_the_loss_is_the_definition(tmp_path, tokenizer):
    """Task and anchors each a mean over their own tokens, in the second step of a run."""
    config = adapter(regularizers=terms(lambda_diversity=0.0))
    settings = {"max_steps": 2, "peft_config": config, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}
    trainer = build(tmp_path, tokenizer, model=tiny_llama().double(), **settings)
    seen = {}

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                seen.update(model=fresh(model))

    trainer.add_callback(Second())
    trainer.train()
    run, model = trainer.ba_lora_run, seen["model"]
    rows = [run.anchors._trained[i] for i in run.anchors._stream.of_step(1)]
    assert len(rows) == 1  # half a row for each of two
    task = history(trainer, "balora/task")[1]
    anchors = dense_anchors(model, rows)
    assert history(trainer, "balora/anchor_consistency")[1] == pytest.approx(anchors.item(), rel=1e-6)
    expected = task + 0.5 * history(trainer, "balora/consistency")[1] + 0.5 * anchors.item()
    for key in ("loss", "balora/loss"):
        assert history(trainer, key)[1] == pytest.approx(expected, rel=1e-6)


def test_the_global_batch_may_be_cut_anyhow(tmp_path, tokenizer):
    """Four rows a step in one, two or four micro-batches, one of which meets an anchor: or all in one."""
    cuts = []
    for batch, steps in ((4, 1), (2, 2), (1, 4)):
        keep = Gradients()
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "callbacks": [keep]}
        trainer = trained(tmp_path / str(steps), tokenizer, {"anchor_fraction": 0.6}, **settings)
        cuts.append((trainer, keep.found))
    (whole, expected), *others = cuts
    scale = max(g.abs().max() for g in expected.values())
    for trainer, found in others:
        for name, gradient in expected.items():
            assert (gradient - found[name]).abs().max() < 1e-5 * scale, name
        for key in KEYS:
            assert history(trainer, key) == pytest.approx(history(whole, key), rel=1e-5, abs=1e-7), key
    assert all(value > 0 for value in history(whole, "balora/anchor_consistency"))


def test_packed_rows_and_padded_ones_meet_the_same_anchors(tmp_path, tokenizer):
    """Padding-free and unpacked: the same documents in a step, the same loss."""
    runs = [trained(tmp_path / str(free), tokenizer, padding_free=free, max_length=None) for free in (False, True)]
    for key in KEYS:
        assert history(runs[1], key) == pytest.approx(history(runs[0], key), rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("cached", [False, True])
def test_resuming_is_exact(cached, tmp_path, tokenizer, ids):
    """The stream goes on from the step; the teacher's rows are the same bits, computed again or read."""
    values = {"preset": "iclr2026", "teacher_cache": str(tmp_path / "cache") if cached else None}
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    settings["peft_config"] = adapter(lora_dropout=0.1, regularizers=terms(**values))
    whole = trained(tmp_path, tokenizer, **settings)
    resumed = build(tmp_path, tokenizer, **settings)
    passes = Passes().watch(resumed, resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert torch.equal(logits(resumed.model.eval(), ids), logits(whole.model.eval(), ids))
    for key in KEYS:
        assert history(resumed, key) == history(whole, key), key
    if cached:
        assert not passes.counts


def test_what_anchors_cost(tmp_path, tokenizer):
    """Beside a student's pass over their rows: the teacher once over each of them, before the first step."""
    settings = {"max_steps": 12}
    counts = []
    for values in ({}, {"anchor_data": None}):
        trainer = build(tmp_path, tokenizer, **{**settings, "peft_config": adapter(regularizers=terms(**values))})
        passes = Passes().watch(trainer, trainer.model)
        trainer.train()
        trainer.evaluate(trainer.train_dataset)
        counts.append(passes.counts)
    with_them, without = counts
    documents = len(TEXTS)
    assert sum(with_them.values()) - sum(without.values()) <= -(-documents // run_anchors._ROWS) + 2  # and one alone


def test_none_is_bit_equal_to_a_run_without(tmp_path, tokenizer):
    plain = trained(tmp_path, tokenizer, peft_config=adapter(regularizers=terms(anchor_data=None)))
    assert not history(plain, "balora/anchor_consistency")
    none = trained(tmp_path, tokenizer, {"anchor_fraction": 0.0})
    for key in KEYS:
        assert history(none, key) == history(plain, key)
    some = trained(tmp_path, tokenizer)
    assert history(some, "balora/task")[0] == pytest.approx(history(plain, "balora/task")[0], rel=1e-6)
    assert history(some, "loss")[-1] != history(plain, "loss")[-1]


def test_evaluations_measure_the_same_documents(tmp_path, tokenizer):
    """Which training leaves alone; also before it, and whatever the batches are."""
    trainer = build(tmp_path, tokenizer, evaluate=True, peft_config=adapter(regularizers=terms()))
    before = trainer.evaluate()
    assert before["eval_balora/anchor_consistency"] < 1e-4  # bfloat16, which is all
    trainer.train()
    anchors = trainer.ba_lora_run.anchors
    expected = dense_anchors(trainer.model.eval(), anchors._evaluated).item()
    for size in (8, 2):
        trainer.args.per_device_eval_batch_size = size
        result = trainer.evaluate()
        assert result["eval_balora/anchor_consistency"] == pytest.approx(expected, rel=1e-3)
        total = result["eval_balora/task"] + 0.5 * (result["eval_balora/consistency"] + expected)
        total += 0.02 * result["eval_balora/diversity"]
        assert result["eval_balora/loss"] == pytest.approx(total, rel=1e-4)
    assert len(anchors._evaluated) == 8 and len(anchors._trained) == 12
    assert trainer.predict(trainer.eval_dataset).predictions.shape[0] == 5  # the host's own rows


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
    ],
)
def test_checkpointing_and_autocast(changes, tmp_path, tokenizer):
    plain = {key: value for key, value in changes.items() if not key.startswith("gradient_check") and key != "bf16"}
    ours, expected = (trained(tmp_path, tokenizer, **settings) for settings in (changes, plain))
    tolerance = 0.05 if changes.get("bf16") else 1e-5
    for key in KEYS:
        assert history(ours, key) == pytest.approx(history(expected, key), rel=tolerance, abs=1e-5), key


def test_compiled(tmp_path, tokenizer, without_inductor):  # noqa: F811
    runs = []
    for compiled in (False, True):
        config = adapter(regularizers=terms(), compile=compiled)
        runs.append(trained(tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), peft_config=config))
    assert "compile" not in runs[1].ba_lora_run.warn.said and without_inductor
    for key in KEYS:
        assert history(runs[1], key) == pytest.approx(history(runs[0], key), rel=1e-5, abs=1e-6), key


def test_the_teachers_interval_is_the_tasks(tmp_path, tokenizer):
    """The anchors' teacher costs nothing, so that they act in every step."""
    trainer = trained(tmp_path, tokenizer, {"teacher_interval": 4}, max_steps=4)
    assert len(history(trainer, "balora/consistency")) == 2
    assert len(history(trainer, "balora/anchor_consistency")) == 4


def test_full_fine_tuning_with_a_cache(tmp_path, tokenizer):
    """The weights are the teacher only before the first step: all anchors of the run are computed then."""
    values = terms(teacher_cache=str(tmp_path / "cache"))
    trainer = build(tmp_path, tokenizer, rows=TEXTS[:6], regularizers=values, evaluate=True)
    trainer.train()
    found = history(trainer, "balora/anchor_consistency")
    assert found[0] < 1e-4 < found[-1]
    assert trainer.evaluate()["eval_balora/anchor_consistency"] > 1e-4


def test_few_rows_and_memory_are_said(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(run_anchors, "MEMORY", 64 * 200)  # of 32 numbers of 2 bytes
    logging.getLogger("transformers").addHandler(caplog.handler)
    trainer = trained(tmp_path, tokenizer)
    assert len(trainer.ba_lora_run.anchors._trained) < 12
    inert = build(tmp_path, tokenizer, peft_config=adapter(regularizers=terms(lambda_consistency=0.0)))
    logging.getLogger("transformers").removeHandler(caplog.handler)
    said = [record.getMessage() for record in caplog.records]
    assert sum("of 20 documents are used" in line and "Name a teacher_cache" in line for line in said) == 1
    assert any("with lambda_consistency=0 does nothing: raise" in line for line in said)
    assert inert.ba_lora_run.anchors is None


def test_refusals_before_the_svd(tmp_path, tokenizer, monkeypatch):
    """A file that is not there, in TRL and in transformers; no tokenizer."""
    monkeypatch.setattr("balora_plugin.hosts.trl.get_ba_lora_model", pytest.fail)
    monkeypatch.setattr("balora_plugin.hosts.transformers.get_ba_lora_model", pytest.fail)
    missing = adapter(regularizers=terms(anchor_data="missing.jsonl"))
    with pytest.raises(ValueError, match=r"^anchor_data='missing.jsonl': there is no such file: write the path"):
        build(tmp_path, tokenizer, peft_config=missing)
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    with pytest.raises(ValueError, match=r"^anchor_data='missing.jsonl': there is no such file"):
        BaLoraTrainer(model=tiny_llama(), train_dataset=rows, processing_class=tokenizer, peft_config=missing)
    with pytest.raises(ValueError, match=r"anchor_data='<list of 20 rows>' needs a tokenizer: pass processing_class="):
        BaLoraTrainer(model=tiny_llama(), train_dataset=rows, peft_config=adapter(regularizers=terms()))


def test_an_adapter_names_no_text_of_somebody_elses(tmp_path, tokenizer):
    """Training on from an adapter takes its anchors where the file is here; nothing is fetched by a name in it."""
    from balora_plugin.adapter.config import BaLoraConfig

    path = tmp_path / "anchors.jsonl"
    path.write_text("\n".join(map(json.dumps, TEXTS)))
    trainer = trained(tmp_path, tokenizer, {"anchor_data": str(path)})
    trainer.save_model(str(tmp_path / "adapter"))
    assert BaLoraConfig.from_pretrained(str(tmp_path / "adapter")).regularizers.anchor_data == str(path)
    path.unlink()
    assert BaLoraConfig.from_pretrained(str(tmp_path / "adapter")).regularizers.anchor_data is None
