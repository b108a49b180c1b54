"""`model_init=`, the Trainer's own way to sweep: every training sets its model up."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from classifiers import classifier
from datasets import Dataset
from helpers import TERMS
from models import tiny_llama
from peft import LoraConfig, PeftModel
from transformers import DataCollatorForLanguageModeling, TrainingArguments
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, BaLoraTrainer, get_ba_lora_model

from .histories import rows_of

TEXTS = [f"The number {i} comes before {i + 1}" for i in range(12)]


def adapter(**changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "regularizers": TERMS}
    return BaLoraConfig(**{**values, **changes})


def build(tmp_path, tokenizer, model=None, model_init=None, peft_config=None, regularizers=None, **changes):
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
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
        model=model,
        model_init=model_init,
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
        peft_config=peft_config,
        regularizers=regularizers,
    )


def history(trainer):
    return rows_of(trainer.state.log_history)


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("where", ["peft_config", "wrapped", "plain_lora"])
def test_each_training_is_the_one_of_a_model_that_was_given(where, tmp_path, tokenizer):
    config = LoraConfig(r=4, target_modules="all-linear") if where == "plain_lora" else adapter()
    terms = TERMS if where == "plain_lora" else None

    def given():
        torch.manual_seed(5)
        return get_ba_lora_model(tiny_llama(), config) if where == "wrapped" else tiny_llama()

    peft_config = None if where == "wrapped" else config
    # a model_init is called behind the trainer's own seed, and with it the random start of a plain LoRA is drawn
    torch.manual_seed(1)
    one = build(tmp_path, tokenizer, given(), peft_config=peft_config, regularizers=terms)
    one.train()
    swept = build(tmp_path, tokenizer, model_init=given, peft_config=peft_config, regularizers=terms)
    first = None
    for _ in range(2):
        model, run = swept.model, swept.ba_lora_run
        swept.train()
        assert swept.model is not model and isinstance(swept.model, PeftModel) and swept.ba_lora_run is not run
        assert swept.ba_lora_run.model is swept.model.get_base_model()
        assert len(history(swept)) == len(history(one)) and any(history(swept))
        if where != "plain_lora":
            assert [list(row.items()) for row in history(swept)] == [list(row.items()) for row in history(one)]
            assert all(torch.equal(p, trained(one)[name]) for name, p in trained(swept).items())
        elif first is not None:
            assert all(torch.equal(p, first[name]) for name, p in trained(swept).items())
        first = trained(swept)
    kinds = [type(callback).__name__ for callback in swept.callback_handler.callbacks]
    assert kinds.count("FiniteGuard") == 1 and "CostCallback" not in kinds
    assert swept.evaluate()["eval_balora/consistency"] > 0


def test_a_trial_chooses_the_adapter_and_the_terms(tmp_path, tokenizer):
    current = {"r": 4, "lambda": 0.5}  # a Trainer takes a trial only where optuna, ray or wandb is installed

    def init(trial):
        values = trial or current
        terms = replace(TERMS, lambda_consistency=values["lambda"])
        return get_ba_lora_model(tiny_llama(), adapter(r=values["r"], regularizers=terms))

    trainer = build(tmp_path, tokenizer, model_init=init)
    for rank, weight in ((2, 0.25), (8, 0.0)):
        model = trainer.call_model_init({"r": rank, "lambda": weight})
        assert model.peft_config["default"].r == rank and trainer.ba_lora.lambda_consistency == weight
        assert trainer.ba_lora_run.model is model.get_base_model()
        current.update({"r": rank, "lambda": weight})
        trainer.train()
        assert trainer.model is not model and trainer.model.peft_config["default"].r == rank
        assert ("balora/consistency" in history(trainer)[1]) == bool(weight)


def test_hyperparameter_search(tmp_path, tokenizer):
    pytest.importorskip("optuna")
    trainer = build(tmp_path, tokenizer, model_init=lambda: tiny_llama(), peft_config=adapter(), eval_strategy="steps")
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}, None, 2
    )
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]  # of the last trial
    assert trainer.objective == evaluated[-1]  # the host's own default would add our keys to one another
    assert 1e-3 <= best.hyperparameters["learning_rate"] <= 1e-2


def test_resuming_a_run_of_model_init(tmp_path, tokenizer):
    options = {"model_init": lambda: tiny_llama(), "save_strategy": "steps", "save_steps": 2}
    whole = build(tmp_path, tokenizer, peft_config=adapter(), **options)
    whole.train()
    again = build(tmp_path, tokenizer, peft_config=adapter(init_lora_weights="pissa_fast"), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert all(torch.equal(p, trained(again)[name]) for name, p in trained(whole).items())


def test_a_classifiers_head_is_its_own_in_each_training(tmp_path):
    rows = Dataset.from_list([{"input_ids": [3 + i, 4, 5], "labels": i % 2} for i in range(8)])
    trainer = BaLoraTrainer(
        model_init=lambda: classifier("bert", num_labels=2),
        args=TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", seed=1),
        train_dataset=rows,
        peft_config=adapter(target_modules=None, regularizers=replace(TERMS, task="nlu")),
    )
    for _ in range(2):
        trainer.train()
        assert trainer.ba_lora_run.model is trainer.model.get_base_model()


def test_what_no_model_can_be_made_of_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="model_init"):
        build(tmp_path, tokenizer, peft_config=adapter())
    with pytest.raises(ValueError, match="bare"):
        build(
            tmp_path,
            tokenizer,
            model_init=lambda: get_ba_lora_model(tiny_llama(), adapter()),
            peft_config=adapter(),
        )


def test_an_sft_trainer_takes_a_model_init_that_is_set_on_it(tmp_path, tokenizer):
    """TRL's constructor has none."""
    trainer = BaLoraSFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(
            str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=adapter(),
    )
    trainer.model_init = lambda: tiny_llama()
    for _ in range(2):
        trainer.train()
        assert isinstance(trainer.model, PeftModel) and trainer.ba_lora_run.model is trainer.model.get_base_model()
    assert history(trainer)[1]["balora/consistency"] > 0
