"""Batches and calls that a Trainer takes and most users never make."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from classifiers import classifier
from datasets import Dataset
from helpers import TERMS
from models import tiny_llama
from torch import nn
from transformers import TrainingArguments
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, BaLoraTrainer, get_ba_lora_model
from balora_plugin.adapter.model import BaLoraModel


def adapter(**changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "regularizers": TERMS}
    return BaLoraConfig(**{**values, **changes})


def build(tmp_path, model=None, **changes):
    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", seed=1)
    rows = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))} for _ in range(8)]
    return BaLoraTrainer(
        model=tiny_llama() if model is None else model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=adapter(**changes),
    )


def moved(trainer):
    torch.manual_seed(4)
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.normal_(std=0.05)
    return trainer


def test_embeddings_in_the_place_of_tokens_give_the_same_terms(tmp_path, ids):
    trainer = moved(build(tmp_path))
    embeds = trainer.model.get_input_embeddings()(ids).detach()
    batches = ({"input_ids": ids, "labels": ids}, {"inputs_embeds": embeds, "labels": ids})
    for training in (True, False):
        trainer.model.train(training)
        terms = []
        for batch in batches:
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, batch)
            found = [loss.detach()]
            if training:  # an evaluation has no gradient
                loss.backward()
                found += [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
            terms.append(found)
        assert all(torch.equal(a, b) for a, b in zip(*terms, strict=True))
    assert trainer.prediction_step(trainer.model, batches[1], True)[0].isfinite()


def test_an_evaluation_step_before_training_is_that_of_an_evaluation(tmp_path, ids):
    trainer = moved(build(tmp_path))
    batch = {"input_ids": ids, "labels": ids}
    trainer.model.train()  # where transformers leaves a new trainer's model
    loss, logits, labels = trainer.prediction_step(trainer.model, batch, False)
    trainer.model.eval()
    expected = trainer.model(**batch)
    torch.testing.assert_close(loss, expected.loss.detach())
    torch.testing.assert_close(logits, expected.logits.detach())
    assert torch.equal(labels, ids)
    taken = trainer.ba_lora_metrics.take("eval", lambda value, how: value, judge=False)
    assert taken["balora/consistency"] > 0


def test_a_loss_before_training_is_that_of_its_first_micro_batch(tmp_path, ids):
    trainer = build(tmp_path)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids}, num_items_in_batch=torch.tensor(22))
    assert loss.isfinite() and loss.requires_grad


def test_sft_counts_the_tokens_of_a_batch_without_mask_and_positions(tmp_path, tokenizer, ids):
    trainer = BaLoraSFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no"),
        train_dataset=Dataset.from_list([{"text": "some words"}] * 4),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=adapter(),
    )
    trainer.model.train()
    for batch in ({"input_ids": ids, "labels": ids}, {"inputs_embeds": torch.randn(2, 12, 32), "labels": ids}):
        before = trainer._total_train_tokens
        assert trainer.compute_loss(trainer.model, batch).isfinite()
        assert trainer._total_train_tokens - before == ids.numel()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_takes_embeddings(kind, tmp_path, ids):
    terms = replace(TERMS, task="nlu", svd_input="features")
    trainer = moved(build(tmp_path, classifier(kind), target_modules=None, regularizers=terms))
    trainer.model.eval()
    embeds = trainer.model.get_input_embeddings()(ids).detach()
    labels = torch.tensor([0, 2])
    losses = [
        trainer.prediction_step(trainer.model, {**batch, "labels": labels}, True)[0]
        for batch in ({"input_ids": ids}, {"inputs_embeds": embeds})
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("start", ["pissa", True])
def test_a_module_without_config_saves_and_loads(start, trains, tmp_path):
    def bare():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    config = BaLoraConfig(r=2, lora_alpha=2, target_modules=["0", "2"], init_lora_weights=start)
    model, x = get_ba_lora_model(bare(), config), torch.randn(3, 8)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"config": BaLoraConfig.from_pretrained(tmp_path)}):
        again = BaLoraModel.from_pretrained(bare(), tmp_path, is_trainable=trains, **options)
        assert torch.equal(again(x), model(x))
