"""One run: trains one method on its seed's rows and measures it at several steps and, at the end, at several scales."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig

from .cells import Method
from .data import Row, of_seed
from .measure import Yardstick


@dataclass(frozen=True)
class Sizes:
    """What all runs share. Lengths are in tokens; `looks` are the steps after which a run is measured."""

    steps: int = 24
    looks: tuple[int, ...] = (8, 24)
    scales: tuple[float, ...] = (0.5, 0.75)  # of the last step's adapter, beside 1
    batch: int = 4
    longest: int = 104
    rank: int = 16
    pool: int = 160  # problems that seeds draw their rows from
    test: int = 36
    documentation: int = 32
    instructions: int = 36
    text: int = 48
    per_kind: int = 8
    trained_in: str = "bfloat16"  # autocast; the adapter is float32
    measured_in: str = "float32"


@dataclass(frozen=True)
class Setup:
    """What a run needs beside its method: the base, a pool of rows, the yardstick, the teacher's folder, anchors."""

    model: str
    tokenizer: Any
    pool: Sequence[Row]
    yardstick: Yardstick
    cache: Path
    anchors: Path
    sizes: Sizes


class Looks(TrainerCallback):
    """Measures the model after some of the steps."""

    def __init__(self, setup: Setup, scaled: bool) -> None:
        self.setup, self.scaled = setup, scaled
        self.points: list[dict[str, Any]] = []

    def on_step_end(self, _args: Any, state: Any, _control: Any, **kwargs: Any) -> None:
        """Called by the trainer after every optimizer step."""
        sizes, yardstick = self.setup.sizes, self.setup.yardstick
        if state.global_step not in sizes.looks:
            return
        last = state.global_step == sizes.steps
        for scale in (1.0, *(sizes.scales if last and self.scaled else ())):
            with yardstick.adapted(kwargs["model"], scale):
                self.points.append({"step": state.global_step, "scale": scale, **yardstick.look(bias=last)})


def config_of(method: Method, setup: Setup) -> BaLoraConfig:
    """The adapter with its terms; the teacher's outputs are computed once for all methods and seeds."""
    sizes = setup.sizes
    kept: dict[str, Any] = {} if method.is_rival else {"teacher_cache": str(setup.cache)}
    if method.anchors:
        kept |= {"anchor_data": str(setup.anchors), "anchor_fraction": method.anchors}
    return BaLoraConfig(
        r=sizes.rank,
        lora_alpha=sizes.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=method.start,
        regularizers=RegularizerConfig(**method.terms, **kept, share_interval=max(1, sizes.steps // 4)),
    )


def arguments(method: Method, sizes: Sizes, seed: int, folder: str) -> TrainingArguments:
    """A constant rate after the warm-up, so that the model after n steps is what a run of n steps gives."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=sizes.steps,
        per_device_train_batch_size=sizes.batch,
        learning_rate=method.rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, sizes.steps // 10),
        weight_decay=method.decay,
        use_cpu=True,
        bf16=sizes.trained_in == "bfloat16",
        seed=seed,
        save_strategy="no",
        report_to=[],
        logging_steps=max(1, sizes.steps // 4),
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def run(method: Method, seed: int, setup: Setup) -> dict[str, Any]:
    """Trains and measures; returns the points and what the trainer logged."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32)
    looks = Looks(setup, scaled=method.is_rival)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaLoraTrainer(
            model=model,
            args=arguments(method, setup.sizes, seed, folder),
            train_dataset=of_seed(setup.pool, seed, setup.sizes.steps * setup.sizes.batch),
            data_collator=DataCollatorForSeq2Seq(setup.tokenizer),
            processing_class=setup.tokenizer,
            peft_config=config_of(method, setup),
            callbacks=[looks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    kept = ("step", "loss", "grad_norm")
    history = [
        {key: value for key, value in entry.items() if key in kept or key.startswith("balora/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return {"points": looks.points, "history": history}
