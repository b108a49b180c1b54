"""Fine-tunes a faulty model by one method, and makes the larger one faulty."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig

from ..forgetting.data import Row
from ..quickstart.cache import cached_folder
from .cells import Method
from .colours import biased_sentences, rows_of


@dataclass(frozen=True)
class Sizes:
    """What all runs share. `probes`: rows of each set that the tiny model is measured on; `test`: of the larger."""

    pretrain_steps: int = 800
    steps: int = 60
    batch: int = 16
    longest: int = 96
    probes: int = 60
    biased_steps: int = 200
    biased_batch: int = 8
    biased_rate: float = 3e-4
    large_steps: int = 24
    large_batch: int = 4
    large_longest: int = 80
    pool: int = 160
    test: int = 16
    rank: int = 16


@dataclass(frozen=True)
class Job:
    """One training: how long, on which rows of which length of batch, at which rate, in which type."""

    steps: int
    batch: int
    rate: float
    seed: int
    trained_in: str = "float32"


def config_of(method: Method, rank: int, steps: int) -> BaLoraConfig | None:
    """The adapter with its terms; None for full fine-tuning."""
    if method.start is None:
        return None
    return BaLoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=method.start,
        regularizers=RegularizerConfig(**method.terms, share_interval=max(1, steps // 3)),
    )


def fine_tune(
    model: Any, tokenizer: Any, rows: Sequence[Row], job: Job, adapter: BaLoraConfig | None
) -> tuple[Any, list[dict[str, Any]]]:
    """Trains `model` on the rows in their order; returns what was trained and what was logged of losses and terms."""
    set_seed(job.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaLoraTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=job.steps,
                per_device_train_batch_size=job.batch,
                train_sampling_strategy="sequential",
                learning_rate=job.rate,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, job.steps // 10),
                weight_decay=0.0,
                use_cpu=True,
                bf16=job.trained_in == "bfloat16",
                seed=job.seed,
                save_strategy="no",
                report_to=[],
                logging_steps=max(1, job.steps // 3),
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            train_dataset=[row.as_training() for row in rows],
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            peft_config=adapter,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    kept = [
        {key: value for key, value in entry.items() if key in ("step", "loss") or key.startswith("balora/")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return trainer.model, kept


def drawn(rows: Sequence[Row], seed: int, count: int) -> list[Row]:
    """`count` rows in the seed's order, begun again at the end; all methods of a seed see the same."""
    found: list[Row] = []
    order = random.Random(seed)
    while len(found) < count:
        found += order.sample(list(rows), len(rows))
    return found[:count]


def biased_model(path: str, name: str, tokenizer: Any, sizes: Sizes, cache: Path) -> Path:
    """Folder of the larger model trained by LoRA, merged, on sentences in which a colour goes with a group of names."""

    def write(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        count = sizes.biased_steps * sizes.biased_batch
        rows = drawn(rows_of(biased_sentences(), tokenizer, 0), 0, count)
        job = Job(sizes.biased_steps, sizes.biased_batch, sizes.biased_rate, 0, "bfloat16")
        trained, _ = fine_tune(model, tokenizer, rows, job, config_of(Method(True), sizes.rank, job.steps))
        trained.merge_and_unload().save_pretrained(folder)

    wanted = {key: value for key, value in asdict(sizes).items() if key.startswith("biased") or key == "rank"}
    return cached_folder(cache, wanted | {"model": name, "sentences": len(biased_sentences())}, write)[0]
