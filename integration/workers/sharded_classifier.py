"""A classifier trained, saved and resumed on two ranks or alone, for test_sharded_classifier.py.

Ranks: fsdp2, zero2, zero3.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from integration.nlu_training import arguments, rows
from integration.workers.fsdp import pass_as_gpus, sharding
from integration.workers.resume import KeepAll, zero
from tests.classifiers import classifier

TERMS = RegularizerConfig(
    preset="iclr2026",
    schedule="constant",
    lambda_consistency=0.5,
    gather_batch_statistics=True,  # two ranks' covariances are one process's
    share_interval=0,  # shares are a rank's own
    head_warmup_steps=1,  # the teacher's head is neither the first nor the student's
)


def train(kind: str, directory: Path, callbacks: list[TrainerCallback], *, seed: int = 1, **changes: Any) -> Any:
    """Eight samples a step. `seed`: of the new head, which no other process draws again."""
    resume = changes.pop("resume", None)
    batch = 8 if kind == "alone" else 4
    if kind.startswith("zero"):
        changes["deepspeed"] = zero(int(kind[-1]))
    changes |= sharding(kind, "BertLayer", saved="SHARDED_STATE_DICT")  # the optimizer's alone: adapters are whole
    args = arguments(directory, per_device_train_batch_size=batch, **changes)
    if kind != "alone":
        pass_as_gpus(args)
        os.environ.pop("ACCELERATE_USE_CPU", None)  # accelerate offers a CPU no DeepSpeed
    trainer = BaLoraTrainer(
        model=loaded(base_of(directory.parent, seed)),
        args=args,
        train_dataset=rows(16),
        eval_dataset=rows(9),
        callbacks=callbacks,
        peft_config=BaLoraConfig(r=2, lora_alpha=2, regularizers=TERMS),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def with_head(seed: int) -> Any:
    """One base under one of many random heads."""
    model = classifier(seed=1)
    model.classifier.load_state_dict(classifier(seed=seed).classifier.state_dict())
    return model


def base_of(directory: Path, seed: int) -> Path:
    return directory / f"base-{os.environ.get('RANK', '0')}-{seed}"


def loaded(directory: Path) -> Any:
    """The model in `directory`; under ZeRO-3 in parts."""
    if is_deepspeed_zero3_enabled():
        from deepspeed import init_distributed

        init_distributed("gloo")
    return BertForSequenceClassification.from_pretrained(directory)


def main(directory: str, kind: str) -> None:
    torch.set_num_threads(1)
    where, keep = Path(directory), KeepAll()
    for seed in (1, 7):  # before any arguments, under which ZeRO-3 splits what is made and one rank alone saves
        with_head(seed).save_pretrained(base_of(where, seed))
    # Adam, because torch loads no empty optimizer state; with an epsilon that makes its steps go with the gradient
    run = {"train_sampling_strategy": "sequential", "learning_rate": 0.1, "adam_epsilon": 1.0}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = train(kind, where / "whole", [keep], **run, **saving)
    result: dict[str, Any] = {"gradients": keep.steps, "eval": whole.evaluate(), "logs": whole.state.log_history}
    whole.save_model(str(where / "final"))
    if kind != "alone":
        checkpoint = str(where / "whole" / "checkpoint-2")
        resumed = train(kind, where / "resumed", [], seed=7, resume=checkpoint, **run, **saving)
        result["resumed"] = resumed.state.log_history
    if whole.accelerator.is_main_process:
        torch.save(result, where / "result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
