"""Streamed data, over more than one pass: a resumed run is the uninterrupted one."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from helpers import TERMS
from models import character_tokenizer, tiny_llama
from transformers import DataCollatorForLanguageModeling, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, BaLoraTrainer

ROWS = [f"The number {i} comes before {i + 1}" + " and so on" * (i % 3) for i in range(10)]
STEPS = 7


def build(host, out, accumulate=1, shuffled=True, **changes):
    """Ten rows, two a micro-batch: five a pass, of which one is left over where two are a step."""
    values = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulate,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_steps": 1,
        "disable_tqdm": True,
        **changes,
    }
    config = BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, regularizers=TERMS)
    tokenizer = character_tokenizer()
    if host == "trl":
        from trl import SFTConfig

        data = Dataset.from_list([{"text": text} for text in ROWS])
    else:
        data = Dataset.from_list([tokenizer(text) for text in ROWS])
    data = data.to_iterable_dataset()
    if shuffled:
        data = data.shuffle(seed=3, buffer_size=4)
    if host == "trl":
        args = SFTConfig(**values, bf16=False, gradient_checkpointing=False)
        return BaLoraSFTTrainer(
            model=tiny_llama(), args=args, train_dataset=data, processing_class=tokenizer, peft_config=config
        )
    return BaLoraTrainer(
        model=tiny_llama(),
        args=TrainingArguments(**values),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
        peft_config=config,
    )


def result(trainer):
    losses = [(row["step"], row["loss"], row["epoch"]) for row in trainer.state.log_history if "loss" in row]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("host", ["transformers", "trl"])
def test_a_run_over_a_stream_resumes_to_the_uninterrupted_one(host, accumulate, shuffled, tmp_path):
    whole = build(host, tmp_path / "whole", accumulate, shuffled)
    whole.train()
    losses, weights = result(whole)
    assert len(losses) == STEPS
    assert losses[-1][2] > 1  # the second pass, or the third
    for step in (1, 3, 5, STEPS) if shuffled else (2, 5):  # inside the first pass, around its end, at the end
        resumed = build(host, tmp_path / f"resumed-{step}", accumulate, shuffled, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        found, here = result(resumed)
        assert found == losses, step
        assert all(torch.equal(here[name], value) for name, value in weights.items()), step


def test_a_stream_that_was_not_ended_and_gets_more_steps(tmp_path):
    """One pass took all steps: an epoch of exactly 1.0, in the first pass still."""
    build("transformers", tmp_path / "first", max_steps=3).train()
    longer = build("transformers", tmp_path / "longer", save_strategy="no")
    longer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    whole = build("transformers", tmp_path / "whole", save_strategy="no")
    whole.train()
    steps = [[loss[:2] for loss in result(trainer)[0]] for trainer in (longer, whole)]
    assert steps[0] == steps[1]
