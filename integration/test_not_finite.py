"""Weights that are NaN, inf or absurd, whatever trains: never saved, never recommended, never the end of a run."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from helpers import TERMS
from models import tiny_llama
from peft import LoraConfig
from transformers import DataCollatorForLanguageModeling, TrainerCallback, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer
from balora_plugin.checkpoint import integrity

TEXTS = [f"The number {i} comes before {i + 1}" + " and so on" * (i % 3) for i in range(12)]
SHAPE = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
KINDS = {  # what trains, and a tensor of it
    "pissa": ({"peft_config": BaLoraConfig(**SHAPE, regularizers=TERMS)}, "lora_B"),
    "ordinary_start": ({"peft_config": BaLoraConfig(**SHAPE, init_lora_weights=True, regularizers=TERMS)}, "lora_A"),
    "modules_to_save": (
        {"peft_config": BaLoraConfig(**SHAPE, modules_to_save=["norm"], regularizers=TERMS)},
        "modules_to_save",
    ),
    "plain_lora": ({"peft_config": LoraConfig(**SHAPE), "regularizers": TERMS}, "lora_B"),
    "full": ({"regularizers": TERMS, "teacher_model": True}, "mlp.up_proj"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Overflow(TrainerCallback):
    """One NaN in a gradient after the clipping, at an optimizer step: the loss of that step is finite."""

    def __init__(self, part, step):
        self.part, self.step, self.name = part, step, None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.name, parameter = next(
                (n, p) for n, p in model.named_parameters() if p.requires_grad and self.part in n
            )
            parameter.grad.view(-1)[0] = math.nan


def build(kind, tmp_path, tokenizer, **changes):
    extra = copy.deepcopy(KINDS[kind][0])
    if extra.get("teacher_model"):
        extra["teacher_model"] = tiny_llama()
    values = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
    }
    return BaLoraTrainer(
        model=tiny_llama(),
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=Dataset.from_list([tokenizer(text) for text in TEXTS]),
        data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
        **extra,
    )


@kinds
@pytest.mark.parametrize("step", [3, 4])
def test_a_gradient_that_overflowed_is_not_saved(kind, step, tmp_path, tokenizer):
    trainer, overflow = build(kind, tmp_path, tokenizer), Overflow(KINDS[kind][1], step)
    trainer.add_callback(overflow)
    with pytest.raises(FloatingPointError, match="NaN or inf after step") as caught:
        trainer.train()
    assert overflow.name is not None and overflow.name in str(caught.value)
    good = tmp_path / "out" / f"checkpoint-{step - 1}"
    assert str(good) in str(caught.value)
    assert integrity.checkpoint_flaw(str(good), [] if kind in ("plain_lora", "full") else ["default"]) is None
    assert not (tmp_path / "out" / f"checkpoint-{step}").exists()


@kinds
def test_a_run_never_ends_with_weights_that_are_not_finite(kind, tmp_path, tokenizer):
    trainer = build(kind, tmp_path, tokenizer, save_strategy="no", logging_steps=100)
    trainer.add_callback(Overflow(KINDS[kind][1], 4))
    with pytest.raises(FloatingPointError, match=r"after step 4.*Start again"):
        trainer.train()


def test_a_weight_that_adams_second_moment_holds_still_for_ever_is_named(tmp_path, tokenizer):
    class Huge(Overflow):
        """Finite, and so is every weight after it; its square is not."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            super().on_pre_optimizer_step(args, state, control, model, **kwargs)
            if state.global_step + 1 == self.step:
                dict(model.named_parameters())[self.name].grad.view(-1)[0] = 1e25

    trainer, huge = build("pissa", tmp_path, tokenizer), Huge("lora_B", 3)
    trainer.add_callback(huge)
    with pytest.raises(FloatingPointError, match=r"^exp_avg_sq of the optimizer for .* holds NaN or inf") as caught:
        trainer.train()
    assert huge.name in str(caught.value) and str(tmp_path / "out" / "checkpoint-2") in str(caught.value)
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_a_run_that_a_callback_ends_early_is_looked_at(tmp_path, tokenizer):
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = build("plain_lora", tmp_path, tokenizer, save_strategy="no", logging_steps=100)
    trainer.add_callback(Overflow("lora_B", 2))
    trainer.add_callback(Enough())
    with pytest.raises(FloatingPointError, match="after step 2"):
        trainer.train()


@kinds
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_direct_save_is_refused_before_anything_is_written(kind, value, tmp_path, tokenizer):
    trainer = build(kind, tmp_path, tokenizer)
    name, parameter = next(
        (n, p) for n, p in trainer.model.named_parameters() if p.requires_grad and KINDS[kind][1] in n
    )
    parameter.data.view(-1)[0] = value
    with pytest.raises(FloatingPointError, match="holds NaN or inf") as caught:
        trainer.save_model(str(tmp_path / "saved"))
    assert name in str(caught.value)
    if kind not in ("plain_lora", "full"):  # a model of ours, without any trainer
        with pytest.raises(FloatingPointError, match="holds NaN or inf"):
            trainer.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@kinds
def test_absurdly_large_weights_are_passed_over_and_it_is_said(kind, tmp_path, tokenizer):
    class Wild(TrainerCallback):
        """A step of 1e30: the weights are finite, and saved; the next loss is not."""

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step + 1 == 3:
                for group in optimizer.param_groups:
                    group["lr"] = 1e30

    trainer = build(kind, tmp_path, tokenizer)
    trainer.add_callback(Wild())
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    out = tmp_path / "out"
    assert f"Resume from {out / 'checkpoint-2'} " in str(caught.value)
    assert f"{out / 'checkpoint-3'} is whole, but holds weights beyond 65504" in str(caught.value)


def test_a_checkpoint_says_how_large_its_weights_are(tmp_path, tokenizer):
    from balora_plugin.checkpoint.manifest import LARGEST
    from balora_plugin.checkpoint.names import MANIFEST_FILE

    trainer = build("modules_to_save", tmp_path, tokenizer, max_steps=2)
    trainer.train()
    largest = max(p.abs().max().item() for p in trainer.model.parameters() if p.requires_grad)
    path = tmp_path / "out" / "checkpoint-2" / MANIFEST_FILE
    content = json.loads(path.read_text())
    assert content["largest"] == pytest.approx(largest)
    path.write_text(json.dumps({**content, "largest": 2 * LARGEST}))
    found = integrity.recommended(str(tmp_path / "out"))
    assert found.path == str(tmp_path / "out" / "checkpoint-1")
    assert str(path.parent) in found.in_words()


def test_the_look_knows_nan_inf_and_sizes_of_every_dtype():
    from balora_plugin.finite import first_not_finite, largest_values

    tensors = [
        torch.tensor([1.0, -3.0]),
        torch.tensor([2.0, 5.0], dtype=torch.bfloat16),
        torch.zeros(0),
        torch.tensor([60000.0, -1.0], dtype=torch.float16),
        torch.tensor([[1e30, 0.0]]),
        torch.tensor([7], dtype=torch.int64),
    ]
    assert largest_values(tensors).tolist() == [3.0, 5.0, 0.0, 60000.0, pytest.approx(1e30), 0.0]
    assert first_not_finite(dict(zip("abcdef", tensors, strict=True))) is None
    for value in (math.nan, math.inf, -math.inf):
        assert first_not_finite({"a": tensors[0], "b": torch.tensor([0.0, value], dtype=torch.bfloat16)}) == "b"
