"""Classification runs in Axolotl, which has none of its own: data, collator and metrics through the plug-in's hooks.

Active where the YAML says `model_type: AutoModelForSequenceClassification` beside the terms. Axolotl loads the model
with `num_labels`; datasets are tables of a text or a pair of texts and a label, tokenised here, without prompts or
packing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.loaders import load_tokenizer
from axolotl.utils.data.shared import load_dataset_with_config
from axolotl.utils.dict import DictDefault
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import DataCollatorWithPadding, GenerationConfig, set_seed

from ...classification.data import columns_of, tokenised
from ...classification.scores import scores
from ...findings import Finding
from ...pretrained.classifier_head import head_names

logger = logging.getLogger("axolotl.balora_plugin")


def is_classification(cfg: Any) -> bool:
    """True if the YAML, written or validated, loads a model for sequence classification."""
    return str(cfg.get("type_of_model") or cfg.get("model_type") or "").endswith("ForSequenceClassification")


def load_samples(cfg: Any) -> TrainDatasetMeta:
    """Training and evaluation data of the YAML's `datasets` and `test_datasets` or `val_set_size`, tokenised.

    Raises:
        ValueError: columns, labels or splits that cannot be used; names the dataset.
    """
    tokenizer = load_tokenizer(cfg)
    train = _read(cfg, cfg.datasets, "train", tokenizer)
    evaluation = _read(cfg, cfg.test_datasets, "validation", tokenizer) if cfg.test_datasets else None
    seed = 42 if cfg.seed is None else cfg.seed
    if evaluation is None and cfg.val_set_size:
        size = float(cfg.val_set_size) if cfg.val_set_size < 1 else int(cfg.val_set_size)
        split = train.train_test_split(test_size=size, seed=seed)
        train, evaluation = split["train"], split["test"]
    elif cfg.shuffle_merged_datasets is not False:
        train = train.shuffle(seed=seed)
    steps = math.ceil(len(train) * cfg.num_epochs / cfg.batch_size)
    steps = min(steps, cfg.max_steps) if cfg.max_steps and cfg.max_steps > 0 else steps
    logger.info("BA-LoRA: %d samples to train on, %d to evaluate", len(train), len(evaluation or []))
    return TrainDatasetMeta(train_dataset=train, eval_dataset=evaluation, total_num_steps=steps)


def _read(cfg: Any, entries: Any, split: str, tokenizer: Any) -> Dataset:
    block, found = cfg.get("ba_lora") or {}, []
    for entry in entries:
        where = f"datasets: {entry['path']}"
        table = load_dataset_with_config(DictDefault(dict(entry)), bool(cfg.hf_use_auth_token))
        if isinstance(table, DatasetDict):
            wanted = split if split in table else "train"
            if wanted not in table:
                raise ValueError(f"{where} has the splits {', '.join(table)}: write split: with one of them.")
            table = table[wanted]
        text, label = block.get("text_columns"), block.get("label_column")
        if not text or not label:
            known_text, known_label = columns_of([*table.column_names, *([] if not label else ["label"])], where)
            text, label = text or known_text, label or known_label
        missing = [column for column in (*text, label) if column not in table.column_names]
        if missing:
            raise ValueError(f"{where} has no column {missing[0]!r}: it has {', '.join(table.column_names)}.")
        found.append(
            tokenised(
                table, tokenizer, text, label, max_length=cfg.sequence_len, num_labels=cfg.num_labels, where=where
            )
        )
    return concatenate_datasets(found)


def collator(cfg: Any) -> tuple[type, dict[str, Any]]:
    """Pads inputs and leaves labels as they are; to the longest of a batch unless the YAML asks for more."""
    return DataCollatorWithPadding, {} if cfg.pad_to_sequence_len else {"pad_to_multiple_of": cfg.pad_to_multiple_of}


def merge_by_model(cfg: Any) -> None:
    """Merging by the loaded model: Axolotl's default merges files, and the base's have no head: it would be lost.

    Raises:
        ValueError: the YAML asks for that method.
    """
    if cfg.get("merge_method") == "memory_efficient":
        raise ValueError(
            "merge_method: memory_efficient would leave out the classification head, which the base's files do not "
            "have: remove it (legacy is then taken)."
        )
    cfg["merge_method"] = "legacy"


def before_merging(model: Any) -> None:
    """Axolotl sets an option of the merged model's generation_config, which encoders do not have."""
    if getattr(model, "generation_config", None) is None:
        model.generation_config = GenerationConfig()


def before_loading(cfg: Any) -> None:
    """The new head is drawn while the model loads, before Axolotl seeds: another one in each run otherwise."""
    set_seed(42 if cfg.seed is None else cfg.seed)


@torch.no_grad()
def check_new_head(model: Any) -> None:
    """Draws a head anew that loading left uninitialised: in some releases of transformers a bfloat16 one is whatever
    the memory held.
    """
    deviation = float(getattr(model.config, "initializer_range", None) or 0.02)
    for name in head_names(model):
        for module in getattr(model, name).modules():
            weight = getattr(module, "weight", None)
            if not isinstance(module, torch.nn.Linear) or weight is None or weight.is_meta:  # FSDP: rank 0 loads it
                continue
            if bool(torch.isfinite(weight).all()) and 0 < float(weight.abs().max()) < 100:
                continue
            weight.copy_(torch.randn(weight.shape, device=weight.device) * deviation)
            if module.bias is not None:
                module.bias.zero_()
            logger.warning("BA-LoRA: %s was loaded uninitialised and has been drawn anew", name)


def set_up_trainer(cfg: Any, trainer: Any) -> None:
    """Accuracy and macro-F1 (regression: Pearson's correlation) in evaluations."""
    if trainer.compute_metrics is None:
        trainer.compute_metrics = scores


def of_classification(data: dict[str, Any], block: dict[str, Any]) -> Iterator[Finding]:
    """Finds what in a YAML contradicts a classification run, or is one by half; `block`: its `ba_lora:`."""
    model_type = data.get("model_type") or data.get("type_of_model")
    beside = f"with model_type: {model_type}"
    if not is_classification(data):
        if block.get("task") == "nlu":
            remedy = "write model_type: AutoModelForSequenceClassification and num_labels"
            yield Finding("ba_lora.task", "nlu", beside, remedy)
        for key in ("text_columns", "label_column"):
            if block.get(key):
                yield Finding(f"ba_lora.{key}", repr(block[key]), "is for classification", "remove it", False)
        return
    if block.get("task") == "nlg":
        yield Finding("ba_lora.task", "nlg", f"{beside}, which classifies", "write nlu")
    if block.get("compile"):
        yield Finding("ba_lora.compile", block["compile"], "is for causal language models", "remove it", False)
    labels = data.get("num_labels")
    if isinstance(labels, bool) or not isinstance(labels, int) or labels < 1:
        yield Finding("num_labels", str(labels), "must be the number of classes, or 1 for regression")
    if data.get("deepspeed") and data.get("adapter") != "ba_lora":
        why = f"with adapter: {data.get('adapter')} does not work {beside}, whose teacher's head it would not restore"
        remedy = "write adapter: ba_lora, or remove it (several GPUs train it with DDP)"
        yield Finding("deepspeed", data["deepspeed"], why, remedy)
    for key in _NOT_HERE:
        if data.get(key):
            yield Finding(key, data[key], f"does not work {beside}", "remove it")
    for entry in [*(data.get("datasets") or []), *(data.get("test_datasets") or [])]:
        if isinstance(entry, dict) and entry.get("type") not in (None, "classification"):
            yield Finding(
                "datasets",
                f"type: {entry['type']}",
                f"of {entry.get('path')} is a prompt format, which a classifier does not read",
                "remove the line (text and label columns: ba_lora.text_columns, ba_lora.label_column)",
            )


_NOT_HERE = (
    "sample_packing",
    "eval_sample_packing",
    "batch_flattening",
    "pretraining_dataset",
    "streaming",
    "chat_template",
    "eval_causal_lm_metrics",
    "do_causal_lm_eval",
    "do_bench_eval",
)
