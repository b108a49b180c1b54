"""A YAML of example_configs/ with what a test machine lacks in small: the model, the data, a GPU, several of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import multimodal
import torch
from models import character_tokenizer
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from ..models.families import CAUSAL_LM, CLASSIFIER, tiny
from .bases import BASES

ROWS, FIRST = 8, 6
# of a machine with several GPUs, or with one
_ENGINE = ("fsdp_version", "fsdp_config", "deepspeed", "use_ray", "ray_num_workers", "resources_per_worker")
_PACKED = ("model_quantization_config", "model_quantization_config_kwargs")  # a tiny model is not stored so
PROCESSED = {"gemma3": "<start_of_image>"}  # kinds with a processor that needs no torchvision -> where its image goes
QUESTIONS = {
    "latin": ("What is {0} plus {0}?", "It is {1}, of course."),
    "chinese": ("{0} 加 {0} 等于多少", "答案是 {1}。"),
}


def swapped(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a YAML's values for this machine: the same model in tiny, a few rows of the same columns, two steps.

    Args:
        values: The YAML.
        folder: Where model, data and output are put.
    """
    changed = {key: value for key, value in copy.deepcopy(values).items() if key not in (*_ENGINE, *_PACKED)}
    base = str(write_base(values, folder))
    changed |= {
        "base_model": base,
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "max_steps": 2,
        "num_epochs": 1,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "warmup_ratio": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "device_map": {"": "cpu"},
        **dict.fromkeys(("bf16", "fp16", "tf32"), False),
    }
    if "overrides_of_model_config" in values:  # the padding of a base that was trained without
        changed["overrides_of_model_config"] = {"pad_token_id": 3}
    if values.get("sample_packing"):  # so that the few rows are several packed ones
        changed |= {"sequence_len": 384, "micro_batch_size": 1}
    for key in ("eval_strategy", "save_steps", "eval_steps"):
        changed.pop(key, None)
    for key in ("datasets", "test_datasets"):
        if key in values:
            changed[key] = [_local(entry, values, folder / f"{key}{i}.jsonl") for i, entry in enumerate(values[key])]
    if values.get("val_set_size"):
        changed["val_set_size"] = 2
    block = changed.get("ba_lora") or {}
    for key in ("start_from", "teacher_cache", "anchor_data"):
        if key in block:
            block[key] = {"start_from": base, "teacher_cache": str(folder / "cache")}.get(key) or _anchors(folder)
    return changed


def script_of(values: dict[str, Any]) -> str:
    """Returns the script of a YAML's rows, by its own name."""
    return "chinese" if "-zh" in json.dumps(values["datasets"]) else "latin"


def write_base(values: dict[str, Any], folder: Path) -> Path:
    """Writes the tiny base model with its tokenizer, or its processor; returns their directory."""
    kind = BASES[values["base_model"]].kind
    path = folder / "base"
    if kind in multimodal.FAMILIES:
        multimodal.tiny_multimodal(kind).save_pretrained(path)
        if kind in PROCESSED:
            multimodal.tiny_processor(kind, PROCESSED[kind]).save_pretrained(path)
        else:
            character_tokenizer().save_pretrained(path)
        return path
    tokenizer = byte_tokenizer(tuple((values.get("special_tokens") or {}).values()))
    task = CLASSIFIER if values.get("num_labels") else CAUSAL_LM
    model = tiny(kind, task, vocabulary=len(tokenizer))
    model.config.num_labels = 2
    if "pad_token" in (values.get("special_tokens") or {}):  # of a base that was trained without padding
        model.config.pad_token_id = None
    (model.base_model if task == CLASSIFIER else model).save_pretrained(path)  # a classifier's head is new
    tokenizer.save_pretrained(path)
    return path


def byte_tokenizer(also: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of a token a byte, which reads any script; `also`: more special tokens."""
    names = list(dict.fromkeys(["<pad>", "<s>", "</s>", *also]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*names, *alphabet])}
    raw = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(also)})
    tokenizer.chat_template = character_tokenizer().chat_template
    return tokenizer


def _local(entry: dict[str, Any], values: dict[str, Any], path: Path) -> dict[str, Any]:
    """A dataset of the YAML over a few rows of its own columns, the first six of them where it takes the first N."""
    rows = [_row(entry, values, i, path.parent) for i in range(ROWS)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    local = {key: value for key, value in entry.items() if key not in ("path", "name", "split")}
    split = f"train[:{FIRST}]" if "[:" in str(entry.get("split")) else "train"
    return {**local, "path": str(path), "ds_type": "json", "split": split}


def _row(entry: dict[str, Any], values: dict[str, Any], i: int, folder: Path) -> dict[str, Any]:
    question, answer = (words.format(i, 2 * i) for words in QUESTIONS[script_of(values)])
    if values.get("num_labels"):
        return {"sentence": question, "label": i % values["num_labels"]}
    form = entry["type"]
    if isinstance(form, dict):
        row = {form["field_instruction"]: question, form["field_output"]: answer}
        return {**row, form["field_input"]: "" if i % 2 else question} if "field_input" in form else row
    if form == "alpaca":
        return {"instruction": question, "input": "", "output": answer}
    if values.get("processor_type"):
        content = [{"type": "image", "path": _picture(folder)}, {"type": "text", "text": question}]
        said: list[Any] = [("user", content), ("assistant", [{"type": "text", "text": answer}])]
    else:
        said = [("user", question), ("assistant", answer)]
    names = entry.get("message_property_mappings") or {"role": "role", "content": "content"}
    return {
        entry.get("field_messages", "messages"): [{names["role"]: who, names["content"]: what} for who, what in said]
    }


def _picture(folder: Path) -> str:
    path = folder / "picture.png"
    if not path.exists():
        pixels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(2))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return str(path)


def _anchors(folder: Path) -> str:
    path = folder / "anchors.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i} and {i} are {2 * i}."}) for i in range(ROWS)))
    return str(path)
