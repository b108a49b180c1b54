"""A run that dies for memory: the same error, with what took the memory and what would save some."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import ba_lora
from models import load_quantised, tiny_llama
from transformers import TrainingArguments

from balora_plugin import BaLoraTrainer, RegularizerConfig
from balora_plugin.memory.estimate import gib
from balora_plugin.memory.held import held_by
from balora_plugin.training import out_of_memory

pytestmark = pytest.mark.hosts
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


def trainer_of(model, tmp_path, **arguments):
    data = [{"input_ids": list(range(1, 17)), "labels": list(range(1, 17))}] * 8
    values = {"per_device_train_batch_size": 4, "max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(str(tmp_path), save_strategy="no", **{**values, **arguments})

    def collate(rows):
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    return BaLoraTrainer(model, args, train_dataset=data, data_collator=collate)


def dies(trainer, monkeypatch, message=FULL):
    """The error that leaves train() where a layer's memory is not to be had."""

    def full(*_, **__):
        raise torch.OutOfMemoryError(message)

    layer = trainer.ba_lora_run.model.model.layers[1]
    monkeypatch.setattr(layer, "forward", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    return caught.value


def test_what_would_save_memory_is_said_in_order_with_bytes(tmp_path, monkeypatch):
    trainer = trainer_of(ba_lora(tiny_llama()), tmp_path)
    error = dies(trainer, monkeypatch)
    text = str(error)
    assert text.startswith(FULL)
    assert isinstance(error.__cause__, torch.OutOfMemoryError)
    assert str(error.__cause__) == FULL
    run = trainer.ba_lora_run
    case = out_of_memory._case(run, trainer.args, held_by(run.wrapped, "adamw_torch_fused"))
    now = case.estimate()
    assert f"a step of 4 x 16 tokens takes {now.in_words()}" in text
    order = ["micro_batch_size: 2", "gradient_checkpointing: true", "teacher_interval saves time and no memory"]
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    said = re.search(r"gradient_checkpointing: true saves (\S+) GiB", text)[1]
    assert said == gib(now.total - case.doing(checkpointing=True).estimate().total)


def test_a_model_that_cannot_be_counted_says_what_it_holds(tmp_path, monkeypatch):
    trainer = trainer_of(ba_lora(tiny_llama()), tmp_path)

    def refuse(*_):
        raise RuntimeError("no such model\nmore")

    monkeypatch.setattr(out_of_memory, "hollow", refuse)
    text = str(dies(trainer, monkeypatch))
    assert "the passes could not be counted (no such model)" in text
    assert f"weights {gib(held_by(trainer.model, 'adamw_torch').weights)} GiB" in text


def test_a_quantised_base_is_counted_as_it_is_stored(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    tiny_llama().save_pretrained(tmp_path / "base")
    trainer = trainer_of(ba_lora(load_quantised(tmp_path / "base", "nf4")), tmp_path)
    text = str(dies(trainer, monkeypatch))
    assert f"weights {gib(held_by(trainer.model, 'adamw_torch').weights)}, " in text
    assert "gradient_checkpointing: true saves" in text
    assert "load_in_4bit" not in text


def test_full_fine_tuning_is_counted_too(tmp_path, monkeypatch):
    model = tiny_llama()
    trainer = trainer_of(model, tmp_path)
    trainer = BaLoraTrainer(
        model,
        trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        regularizers=RegularizerConfig(lambda_consistency=0.0),
    )
    text = str(dies(trainer, monkeypatch))
    assert "what trains" in text
    assert "load_in_4bit" not in text  # a base that trains is not quantised
    assert "teacher" not in text


def test_a_trainer_without_terms_is_left_alone(tmp_path, monkeypatch):
    model = tiny_llama()
    trainer = trainer_of(model, tmp_path)

    def full(*_, **__):
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(model.model.layers[0], "forward", full)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    assert str(caught.value) == FULL


def test_the_cost_report_has_the_same_counts(tmp_path):
    trainer = trainer_of(ba_lora(tiny_llama()), tmp_path)
    trainer.train()
    report = json.loads((tmp_path / "ba_lora_cost.json").read_text())
    states = trainer.optimizer.state.values()
    real = sum(x.nbytes for state in states for x in state.values() if torch.is_tensor(x) and x.ndim)
    assert report["held_bytes"]["optimizer"] == real
    assert report["held_bytes"]["trained"] == sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
