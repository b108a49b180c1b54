"""A trainer that trains again knows nothing of its earlier training: neither its NaN nor where in a step it was."""

from __future__ import annotations

import math

import pytest
from models import tiny_llama
from test_acting import arguments, tokens
from transformers import TrainerCallback

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig

pytestmark = pytest.mark.hosts


def build(tmp_path, callbacks=None, teacher_interval=1, **changes):
    terms = RegularizerConfig(
        lambda_consistency=0.5, lambda_diversity=0.0, lambda_svd=0.0, teacher_interval=teacher_interval
    )
    adapter = BaLoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], regularizers=terms)
    return BaLoraTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path, **changes),
        train_dataset=tokens(),
        peft_config=adapter,
        callbacks=callbacks,
    )


class Breaks(TrainerCallback):
    """Makes a trained weight NaN at the beginning of the third step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(p for name, p in model.named_parameters() if "v_proj.lora_B" in name).data.fill_(math.nan)


def test_a_training_that_nan_ended_is_resumed_by_the_same_trainer(tmp_path):
    trainer = build(tmp_path, [Breaks()], max_steps=4, save_strategy="steps", save_steps=1, logging_steps=1)
    with pytest.raises(FloatingPointError, match=r"balora/task.* at step 3"):
        trainer.train()
    trainer.remove_callback(Breaks)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    logged = [entry["balora/task"] for entry in trainer.state.log_history if "balora/task" in entry]
    assert trainer.state.global_step == 4 and all(map(math.isfinite, logged))


def test_micro_batches_are_counted_from_the_first_in_every_training(tmp_path):
    """Which of them meet the teacher, the anchors and the measuring of shares hangs on it."""
    trainer = build(tmp_path, max_steps=1, gradient_accumulation_steps=2, teacher_interval=3, save_strategy="no")
    requests, met = trainer.ba_lora_requests, []
    step = requests.step
    requests.step = lambda training: met.append(step(training)) or met[-1]
    trainer.train()
    trainer.train()
    assert [request.teacher_factor for request in met] == [3, 0, 3, 0]
