"""GPU hours of the GLUE recipes, counted on shapes: `python -m integration.configs.glue_hours` prints docs/paper.md's.

Not counted: padding, evaluation, and DeBERTa's products with relative positions.
"""

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from balora_plugin.glue.recipe import Recipe, read_recipe, recipe_file
from balora_plugin.glue.tasks import RECIPES

from .counted import flop_a_token, gpu_hours

A40 = 149.7e12  # FLOP/s in bfloat16


class _Set(NamedTuple):
    """A task's training set: its rows, and a row's mean tokens by a word-piece tokenizer, from memory and rounded."""

    rows: int
    length: int


SETS = {
    "mnli": _Set(392_702, 40),
    "sst2": _Set(67_349, 14),
    "mrpc": _Set(3_668, 54),
    "cola": _Set(8_551, 12),
    "qnli": _Set(104_743, 51),
    "qqp": _Set(363_846, 31),
    "rte": _Set(2_490, 71),
    "stsb": _Set(5_749, 32),
    "wnli": _Set(635, 38),
}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_XL = {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25, "pad_token_id": 0}
# Each recipe's model: its type in transformers and its published sizes.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "roberta-large": ("roberta", {**_LARGE, "vocab_size": 50265}),
    "deberta-v3-base": ("deberta-v2", {**_BASE, "vocab_size": 128100}),
    "bert-large": ("bert", {**_LARGE, "vocab_size": 30522}),
    "gpt2-xl": ("gpt2", {**_XL, "vocab_size": 50257}),
}


@cache
def on_shapes(name: str, rank: int) -> Any:
    """A recipe's classifier with a LoRA on every linear layer, without memory."""
    kind, sizes = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **sizes))
        lora = LoraConfig(task_type="SEQ_CLS", r=rank, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, lora)


def flop_of(recipe: Recipe, name: str, task: str) -> float:
    """FLOP of one training token of a task, with the teacher's pass."""
    terms = recipe.regularizers.resolved("nlu")
    work = SimpleNamespace(length=SETS[task].length, checkpointing=False, cached=False, terms=terms)
    return flop_a_token(on_shapes(name, recipe.of(task).r), {}, work)


def hours(recipe: Recipe, name: str, task: str) -> float:
    """A40 hours of a task: all epochs of every learning rate and seed."""
    settings, rows = recipe.of(task), SETS[task]
    trained = rows.rows * rows.length * settings.epochs * len(settings.learning_rates) * len(recipe.seeds)
    return gpu_hours(flop_of(recipe, name, task), trained, A40)


def table() -> str:
    """A row a recipe: hours of each task, and of all."""
    lines = ["| recipe | " + " | ".join(SETS) + " | all |", "|---" * (len(SETS) + 2) + "|"]
    for name in sorted(RECIPES):
        recipe = read_recipe(recipe_file(name))
        found = [hours(recipe, name, task) for task in SETS]
        lines.append(f"| `{name}` | " + " | ".join(f"{one:.1f}" for one in (*found, sum(found))) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    sys.exit(0)
