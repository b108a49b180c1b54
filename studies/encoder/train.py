"""One run of the study: fine-tunes the encoder by one method through BaLoraTrainer and measures what came out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from balora_plugin.config import TERMS

from ..common.classifying import Seen, accuracy, feature_drift, look, macro_f1, per_class
from ..common.terms import NO_TERMS
from ..quickstart.measure import effective_rank, token_divergences
from .data import CLASSES, Sample, Study

METHODS: dict[str, tuple[bool | str, dict[str, Any]]] = {  # start, fields of RegularizerConfig
    "LoRA": (True, NO_TERMS),
    "PiSSA": ("pissa", NO_TERMS),
    "BA-LoRA paper": ("pissa", {"preset": "paper"}),
    "BA-LoRA iclr2026": ("pissa", {"preset": "iclr2026"}),
}


@dataclass(frozen=True)
class Sizes:
    """What every run shares."""

    steps: int = 50
    batch: int = 16
    max_length: int = 32
    rank: int = 8
    dropout: float = 0.0  # the encoder's own, 0.1, doubles the time of a forward pass on a CPU
    warmup: float = 0.1
    per_class: int = 60
    test_per_class: int = 20


def run(model_path: Path, method: str, study: Study, seed: int, rate: float, sizes: Sizes) -> dict[str, float]:
    """Trains one classifier and measures it. The seed sets the head, dropout and the order of the samples."""
    from datasets import Dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
        TrainingArguments,
        set_seed,
    )

    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_path,
        num_labels=len(CLASSES),
        dtype=torch.float32,
        hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.dropout,
    )
    bodies = encoded(tokenizer, study.test, "body", sizes.max_length)
    summaries = encoded(tokenizer, study.test, "summary", sizes.max_length)
    before = look(model, tokenizer, bodies)
    start, terms = METHODS[method]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = BaLoraTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=sizes.steps,
                per_device_train_batch_size=sizes.batch,
                learning_rate=rate,
                lr_scheduler_type="linear",
                warmup_steps=sizes.warmup,  # below 1: a part of all steps
                weight_decay=0.0,
                use_cpu=True,
                seed=seed,
                save_strategy="no",
                report_to=[],
                logging_steps=max(1, sizes.steps // 3),
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(encoded(tokenizer, study.train, "body", sizes.max_length)),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            peft_config=BaLoraConfig(
                r=sizes.rank,
                lora_alpha=sizes.rank,
                target_modules="all-linear",
                init_lora_weights=start,
                regularizers=RegularizerConfig(**terms, share_interval=max(1, sizes.steps // 3)),
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = trainer.state.log_history
    found = measures(before, look(trainer.model, tokenizer, bodies), study.minority)
    shifted = look(trainer.model, tokenizer, summaries)
    found["shift_accuracy"] = accuracy(shifted)
    found["shift_macro_f1"] = macro_f1(shifted)
    for term in TERMS:  # the largest that was logged; 0 where the term is off
        found[f"share_{term}"] = max((row.get(f"balora/share_{term}", 0.0) for row in history), default=0.0)
    found["train_loss"] = next(row["train_loss"] for row in reversed(history) if "train_loss" in row)
    found["seconds"] = round(time.perf_counter() - began, 1)
    return found


def encoded(tokenizer: Any, found: Sequence[Sample], text: str, max_length: int) -> list[dict[str, Any]]:
    """Rows of input_ids, attention_mask and labels, cut at `max_length` tokens."""
    tokens = tokenizer([getattr(sample, text) for sample in found], truncation=True, max_length=max_length)
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": sample.label}
        for ids, mask, sample in zip(tokens["input_ids"], tokens["attention_mask"], found, strict=True)
    ]


def measures(before: Seen, after: Seen, minority: Sequence[int]) -> dict[str, float]:
    """Scores on the held-out bodies, and how far the model went from the one it started as (docs/study.md)."""
    recalls = per_class(after)[0]
    centred = after.features - after.features.mean(dim=0)
    reference, log_probs = (seen.logits.double().log_softmax(dim=-1) for seen in (before, after))
    return {
        "accuracy": accuracy(after),
        "macro_f1": macro_f1(after),
        "minority_recall": float(np.nanmean(recalls[list(minority)])),
        "drift": token_divergences(reference, log_probs).mean().item(),
        "feature_drift": feature_drift(before, after),
        "effective_rank": effective_rank(centred),
    }
