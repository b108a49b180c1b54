"""One run: fine-tunes the encoder by one method through BaLoraTrainer and says what it makes of every test row."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig

from ..common.classifying import Seen, feature_drift, look
from ..quickstart.measure import effective_rank, token_divergences
from .cells import METHODS, Method
from .data import TaskData, training_rows

DIGITS = 4  # significant ones of what is kept by row


def steps_by_task() -> dict[str, int]:
    """How long each task trains."""
    return {"sst2": 100, "cola": 48, "rte": 24}


@dataclass(frozen=True)
class Sizes:
    """What all runs share. `pool`: rows of a task's training set, `held_out` of them to tune on; `test`: reported."""

    steps: dict[str, int] = field(default_factory=steps_by_task)
    batch: int = 16
    length: int = 64
    rank: int = 8
    pool: int = 8000
    held_out: int = 240
    test: int = 277
    looks: int = 3  # measurements of the terms' shares
    trained_in: str = "bfloat16"  # autocast; weights, head and terms are float32


@dataclass
class Setup:
    """What runs need beside their cell. `starts`: by task and seed the model that all methods begin with."""

    model: str
    tokenizer: Any
    tasks: Mapping[str, TaskData]
    sizes: Sizes
    starts: dict[tuple[str, int], Start] = field(default_factory=dict)

    def start(self, data: TaskData, seed: int) -> Start:
        """The start of a task and seed, made once; only the last one is kept in memory for each task."""
        if (data.name, seed) not in self.starts:
            for key in [key for key in self.starts if key[0] == data.name]:
                del self.starts[key]
            model = fresh(self.model, data.num_labels, seed)
            self.starts[data.name, seed] = Start(model, look(model, self.tokenizer, data.test))
        return self.starts[data.name, seed]


@dataclass(frozen=True)
class Start:
    """A pre-trained encoder under a new head, and what it makes of the test rows."""

    model: Any
    seen: Seen


def adapter(method: Method, sizes: Sizes, steps: int) -> BaLoraConfig | None:
    """The adapter with its terms; None for full fine-tuning."""
    if method.start is None:
        return None
    return BaLoraConfig(
        r=sizes.rank,
        lora_alpha=sizes.rank,
        target_modules="all-linear",
        init_lora_weights=method.start,
        regularizers=RegularizerConfig(**method.terms, share_interval=max(1, steps // sizes.looks)),
    )


def arguments(sizes: Sizes, steps: int, rate: float, seed: int, folder: str) -> TrainingArguments:
    """A linear schedule after a short warm-up, as the paper's; the rows come in their order."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=sizes.batch,
        train_sampling_strategy="sequential",
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 16),
        weight_decay=0.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=sizes.trained_in == "bfloat16",
        seed=seed,
        save_strategy="no",
        report_to=[],
        logging_steps=max(1, steps // sizes.looks),
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def fresh(model: str, num_labels: int, seed: int) -> Any:
    """The pre-trained encoder under a new head, the same for every method of a seed; no dropout."""
    set_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=num_labels, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def run(setting: Mapping[str, Any], rate: float, setup: Setup) -> dict[str, Any]:
    """Trains a cell at a rate; measures it on the held-out rows where the cell is of the tuning, else on the test."""
    sizes, data, seed = setup.sizes, setup.tasks[setting["task"]], setting["seed"]
    tuning = "rate" in setting
    steps = sizes.steps[data.name]
    start = setup.start(data, seed)
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaLoraTrainer(
            model=copy.deepcopy(start.model),
            args=arguments(sizes, steps, rate, seed, folder),
            train_dataset=training_rows(data, setting["setting"], seed, steps * sizes.batch, sizes.batch),
            data_collator=DataCollatorWithPadding(setup.tokenizer),
            processing_class=setup.tokenizer,
            peft_config=adapter(METHODS[setting["method"]], sizes, steps),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    after = look(trainer.model, setup.tokenizer, data.held_out if tuning else data.test)
    loss = cross_entropy(after.logits, after.labels).item()
    found = {"rate": rate, "loss": loss, "history": history(trainer.state.log_history)}
    return found if tuning else found | measures(start.seen, after)


def history(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was logged while training, of losses and terms."""
    return [
        {key: value for key, value in entry.items() if key in ("step", "loss") or key.startswith("balora/")}
        for entry in log
        if "loss" in entry
    ]


def measures(before: Seen, after: Seen) -> dict[str, Any]:
    """By test row the logits less their mean and KL(initial || trained); of all rows features' drift and rank."""
    reference, log_probs = (seen.logits.double().log_softmax(dim=-1) for seen in (before, after))
    drift = token_divergences(reference, log_probs)
    return {
        "logits": short(after.logits - after.logits.mean(dim=1, keepdim=True)),
        "drift": short(drift),
        "feature_drift": feature_drift(before, after),
        "effective_rank": effective_rank(after.features - after.features.mean(dim=0)),
    }


def short(values: Tensor) -> Any:
    """A tensor as lists of numbers with so many digits as a report needs."""
    if values.dim() > 1:
        return [short(row) for row in values]
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
