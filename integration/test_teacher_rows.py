"""`teacher_interval` in trainers: which rows meet the teacher, and where it still is every n-th micro-batch."""

from __future__ import annotations

import pytest
import torch
from helpers import logits
from models import character_tokenizer, tiny_llama
from transformers import LlamaForSequenceClassification

from balora_plugin import RegularizerConfig
from balora_plugin.training import teacher_rows

from .test_trl import adapter, build, history, without_inductor  # noqa: F401

KEYS = ("loss", "grad_norm", "balora/consistency", "balora/task")


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


def trained(tmp_path, tokenizer, terms, **changes):
    """A run on four rows a micro-batch, one of two meets the teacher."""
    terms = {"lambda_consistency": 0.5, "teacher_interval": 2, **terms}
    config = adapter(regularizers=RegularizerConfig(**terms), **changes.pop("lora", {}))
    values = {"per_device_train_batch_size": 4, "max_steps": 4, "max_grad_norm": 1e9, **changes}
    trainer = build(tmp_path, tokenizer, peft_config=config, **values)
    trainer.ba_lora_asked = []
    original = trainer.ba_lora_requests.step

    def step(training):
        trainer.ba_lora_asked.append(original(training))
        return trainer.ba_lora_asked[-1]

    trainer.ba_lora_requests.step = step
    return trainer


def test_each_step_meets_the_teacher_on_other_rows_with_n_times_the_weight(tmp_path, tokenizer):
    trainer = trained(tmp_path, tokenizer, {"share_interval": 1, "drift_target": 0.3}, evaluate=True)
    rows = []
    trainer.model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(
        lambda mlp, given: rows.append((len(given[0]), torch.is_grad_enabled()))
    )
    trainer.train()
    asked = trainer.ba_lora_asked
    assert [request.teacher_rows for request in asked] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert asked[0].lambdas.consistency == 2 * 0.5
    assert sorted(set(rows)) == [(2, False), (4, True)]
    assert len(history(trainer, "balora/consistency")) == len(history(trainer, "balora/drift")) == 4
    assert len(history(trainer, "balora/share_consistency")) == 1  # at turns that every process has
    trainer.ba_lora_asked.clear()
    trainer.evaluate()
    assert all(request.teacher_rows is None for request in trainer.ba_lora_asked)  # evaluations meet it on all


@pytest.mark.parametrize(("rows", "accumulated"), [(1, 1), (2, 2)])
def test_what_was_by_micro_batch_is_the_same_to_the_bit(rows, accumulated, tmp_path, tokenizer, monkeypatch):
    def by_micro_batch(turn, rows, interval, accumulated):
        return tuple(range(rows)) if turn % interval == 0 else ()

    found = []
    for rule in (teacher_rows.rows_met, by_micro_batch):
        monkeypatch.setattr(teacher_rows, "rows_met", rule)
        shape = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
        trainer = trained(tmp_path, tokenizer, {}, **shape)
        trainer.train()
        assert all(request.teacher_rows is None for request in trainer.ba_lora_asked)
        found.append([history(trainer, key) for key in KEYS])
    assert found[0] == found[1]


def test_a_resumed_run_goes_on_as_one_that_was_not(tmp_path, tokenizer):
    ids = torch.arange(5, 25).unsqueeze(0)
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lora": {"lora_dropout": 0.1}}
    settings |= {"per_device_train_batch_size": 3}  # the last batch of an epoch has fewer rows
    terms = {"teacher_interval": 4, "schedule": "adaptive"}
    whole = trained(tmp_path, tokenizer, terms, **settings)
    whole.train()
    resumed = trained(tmp_path, tokenizer, terms, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert [r.teacher_rows for r in resumed.ba_lora_asked] == [r.teacher_rows for r in whole.ba_lora_asked[3:]]
    assert history(resumed)[-3:] == history(whole)[3:]
    assert torch.equal(logits(resumed.model.eval(), ids), logits(whole.model.eval(), ids))


@pytest.mark.parametrize("kept", [{}, {"teacher_cache_top_k": 96}], ids=["hidden", "top_k"])
def test_a_cache_gives_the_rows_that_are_met(kept, tmp_path, tokenizer):
    live = trained(tmp_path, tokenizer, {})
    live.train()
    cached = trained(tmp_path, tokenizer, {"teacher_cache": str(tmp_path / "cache"), **kept})
    cached.train()
    assert [request.teacher_rows for request in cached.ba_lora_asked] == [(0, 2), (1, 3)] * 2
    assert history(cached, "balora/consistency") == pytest.approx(
        history(live, "balora/consistency"), rel=2e-2, abs=1e-3
    )


@pytest.mark.slow
def test_compiled(tmp_path, tokenizer, without_inductor):  # noqa: F811
    runs = []
    for compiled in (False, True):
        lora = {"compile": compiled}
        model, terms = tiny_llama(num_hidden_layers=1), {"share_interval": 0}
        runs.append(trained(tmp_path, tokenizer, terms, model=model, lora=lora))
        runs[-1].train()
    assert "compile" not in runs[1].ba_lora_run.warn.said and 0 < len(without_inductor) <= 6
    assert [request.teacher_rows for request in runs[1].ba_lora_asked] == [(0, 2), (1, 3)] * 2
    for key in KEYS:
        assert history(runs[1], key) == pytest.approx(history(runs[0], key), rel=1e-4, abs=1e-6), key


def test_a_padding_free_batch_is_one_row(tmp_path, tokenizer):
    trainer = trained(tmp_path, tokenizer, {}, padding_free=True, max_length=None)
    trainer.train()
    assert [request.teacher_factor for request in trainer.ba_lora_asked] == [2, 0, 2, 0]
    assert all(request.teacher_rows is None for request in trainer.ba_lora_asked)


def test_a_classifiers_samples_meet_it(tmp_path, tokenizer):
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, TrainingArguments

    from balora_plugin import BaLoraTrainer

    rows = [{"input_ids": [5 + i, 6, 7 + i, *range(8, 9 + i % 4)], "labels": i % 2} for i in range(8)]
    torch.manual_seed(0)
    config = adapter(
        task_type="SEQ_CLS",
        regularizers=RegularizerConfig(lambda_consistency=0.5, teacher_interval=4, drift_target=0.5, share_interval=1),
    )
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = BaLoraTrainer(
        model=LlamaForSequenceClassification(tiny_llama().config),
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorWithPadding(tokenizer),
        peft_config=config,
    )
    trainer.train()
    assert len(history(trainer, "balora/consistency")) == len(history(trainer, "balora/drift")) == 4
