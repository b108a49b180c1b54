"""What a model answers before and after: to questions it was trained on, and to others."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .corpus import Instruction, collapse

ASKED = ("random.Random.shuffle", "statistics.median")  # of the training pairs; any others where a Python has them not
UNTRAINED = ("What is the capital of France?", "What is 2 + 3?", "Write one sentence about the sea.")
NEW_TOKENS = 32
LINE = 100


@dataclass(frozen=True)
class Question:
    """`text` as it is shown, `prompt` as the model reads it, and whether it was trained on."""

    text: str
    prompt: str
    trained: bool


def asked_first(pairs: Sequence[Instruction]) -> list[Instruction]:
    """The pairs, those that are asked about at the end in front."""
    return sorted(pairs, key=lambda pair: ASKED.index(pair.name) if pair.name in ASKED else len(ASKED))


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The greedy continuation of a prompt, on one line."""
    asked = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    out = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return collapse(tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True))


def side_by_side(questions: Sequence[Question], answers: Mapping[str, Sequence[str]]) -> str:
    """Each question with the answer of every model below it; `answers` go by the models' names."""
    width = max(map(len, answers))
    lines = []
    for place, question in enumerate(questions):
        lines.append(f"\n{question.text}  ({'trained on' if question.trained else 'not trained on'})")
        for name, said in answers.items():
            head = f"  {name:{width}s}  "
            wrapped = textwrap.wrap(said[place] or "(nothing)", LINE - len(head))
            lines.append(head + f"\n{' ' * len(head)}".join(wrapped))
    return "\n".join(lines)
