"""Going on from a checkpoint that has no optimizer (save_only_model): resumed by name, or as a new run."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from helpers import TERMS
from models import character_tokenizer, tiny_llama
from peft import LoraConfig
from transformers import DataCollatorForLanguageModeling, TrainingArguments
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraModel, BaLoraSFTTrainer, BaLoraTrainer

TEXTS = [f"The number {i} comes before {i + 1}" + " and so on" * (i % 3) for i in range(8)]
SHAPE = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
STEPS = 4


def build(host, out, model=None, **changes):
    """A run of plain gradient descent, which keeps nothing from step to step; without dropout."""
    values = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 0.5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "optim": "sgd",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_only_model": True,
        "disable_tqdm": True,
        **changes,
    }
    tokenizer = character_tokenizer()
    adapter = {} if model is not None else {"peft_config": BaLoraConfig(**SHAPE, regularizers=TERMS)}
    model = model or tiny_llama()
    if host == "trl":
        args = SFTConfig(**values, bf16=False, gradient_checkpointing=False)
        rows = Dataset.from_list([{"text": text} for text in TEXTS])
        return BaLoraSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, **adapter)
    return BaLoraTrainer(
        model,
        TrainingArguments(**values),
        train_dataset=Dataset.from_list([tokenizer(text) for text in TEXTS]),
        data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
        **adapter,
    )


def logged(made):
    keys = ("step", "loss", "learning_rate", "balora/task", "balora/consistency")
    return [{key: row.get(key) for key in keys} for row in made.state.log_history if "loss" in row]


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name or "frozen_" in name}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module", params=["transformers", "trl"])
def finished(request, tmp_path_factory):
    made = build(request.param, tmp_path_factory.mktemp("run"))
    made.train()
    return request.param, made


def test_the_refusal_says_both_ways_and_both_work(finished, tmp_path):
    host, whole = finished
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    with pytest.raises(ValueError, match="save_only_model=True") as caught:
        build(host, tmp_path / "refused").train(resume_from_checkpoint=checkpoint)
    said = str(caught.value)
    assert "\n" not in said
    assert f"trainer.train(resume_from_checkpoint={checkpoint!r}, fresh_optimizer=True)" in said
    assert f"balora_plugin.BaLoraModel.from_pretrained(base, {checkpoint!r}, is_trainable=True)" in said
    assert f"lora_model_dir: {checkpoint}" in said

    # without momentum a fresh optimizer is the old one: data, schedule and steps go on as if nothing had happened
    resumed = build(host, tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=checkpoint, fresh_optimizer=True)
    assert resumed.state.global_step == STEPS
    assert logged(resumed) == logged(whole) and same(factors(resumed.model), factors(whole.model))

    # a new run begins at the first step of its schedule, with the factors of the file
    model = BaLoraModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
    start = factors(model)
    assert all(torch.equal(p, start[name]) for name, p in factors(whole.model).items() if "frozen_" in name)
    new = build(host, tmp_path / "new", model, save_strategy="no")
    assert same(factors(new.model), start)
    new.train()
    rates = [row["learning_rate"] for row in logged(new)]
    assert new.state.global_step == STEPS and rates == [row["learning_rate"] for row in logged(whole)]
    assert logged(new)[0]["balora/task"] != logged(whole)[0]["balora/task"]
    assert not same(factors(new.model), start)


def test_a_whole_checkpoint_can_leave_its_optimizer_out_too(tmp_path):
    adam = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_only_model": False}
    whole = build("transformers", tmp_path / "whole", **adam)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    found = []
    for fresh in (False, True):
        made = build("transformers", tmp_path / str(fresh), **{**adam, "save_strategy": "no"})
        made.train(resume_from_checkpoint=checkpoint, fresh_optimizer=fresh)
        found.append(made)
    assert same(factors(found[0].model), factors(whole.model))
    assert not same(factors(found[1].model), factors(whole.model))  # its moments began anew
    rates = [[row["learning_rate"] for row in logged(made)] for made in (whole, *found)]
    assert rates[0] == rates[1] == rates[2]
    (checkpoint / "optimizer.pt").unlink()  # to save space
    made = build("transformers", tmp_path / "without", **{**adam, "save_strategy": "no"})
    made.train(resume_from_checkpoint=checkpoint, fresh_optimizer=True)
    assert same(factors(made.model), factors(found[1].model))


def test_what_else_is_missing_is_still_refused(tmp_path):
    build("transformers", tmp_path / "run", max_steps=2).train()
    made = build("transformers", tmp_path / "other")
    with pytest.raises(ValueError, match="fresh_optimizer=True without a checkpoint"):
        made.train(fresh_optimizer=True)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"trainer_state\.json.* is missing") as caught:
        made.train(resume_from_checkpoint=str(checkpoint), fresh_optimizer=True)
    assert "To go on with a fresh optimizer" not in str(caught.value)


def test_a_plain_lora_with_terms_too(tmp_path):
    def plain(name):
        return BaLoraTrainer(
            tiny_llama(),
            build("transformers", tmp_path / name).args,
            train_dataset=Dataset.from_list([character_tokenizer()(text) for text in TEXTS]),
            data_collator=DataCollatorForLanguageModeling(character_tokenizer(), mlm=False),
            peft_config=LoraConfig(**SHAPE),
            regularizers=TERMS,
        )

    whole = plain("whole")
    whole.train()
    resumed = plain("resumed")
    resumed.train(resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2", fresh_optimizer=True)
    assert logged(resumed) == logged(whole) and same(factors(resumed.model), factors(whole.model))
