"""What is trained on, measured on and asked, as one model reads it: by its chat template where it has one."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from balora_plugin.samples.rendering import question_of

from .answers import UNTRAINED, Question, asked_first
from .corpus import Corpus, Instruction
from .settings import FinetuningSettings

OTHER = Path(__file__).parents[1] / "forgetting" / "instructions.jsonl"


@dataclass(frozen=True)
class Task:
    """Pairs to train on, held-out ones, pairs of another kind that nobody trains on, and what is asked at the end."""

    train: tuple[Instruction, ...]
    held_out: tuple[Instruction, ...]
    other: tuple[Instruction, ...]
    questions: tuple[Question, ...]

    def digest(self) -> str:
        """Hex digest of all of it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def task_of(corpus: Corpus, settings: FinetuningSettings, tokenizer: Any) -> Task:
    """The task for a model: as many pairs as the settings say, those that are asked about among them.

    A pair that would be cut is left out.
    """

    def whole(pairs: Iterable[Instruction], count: int | None) -> tuple[Instruction, ...]:
        rendered = (replace(pair, prompt=_prompt(pair.prompt, tokenizer)) for pair in pairs)
        fitting = (pair for pair in rendered if _tokens(pair, tokenizer) <= settings.max_length)
        return tuple(itertools.islice(fitting, count))

    train = whole(asked_first(_mixed(corpus.train)), settings.train_pairs)
    held_out = whole(_mixed(corpus.held_out), settings.held_out_pairs)
    rows = [json.loads(line) for line in OTHER.read_text(encoding="utf-8").splitlines()]
    other = [Instruction(row["instruction"], row["instruction"] + "\n", row["answer"]) for row in rows]
    shown = {pair.name: pair.prompt.strip() for pair in corpus.train}
    asked = [Question(shown[pair.name], pair.prompt, True) for pair in train[:2]]
    asked += [Question(text, _prompt(text + "\n", tokenizer), False) for text in UNTRAINED]
    return Task(train, held_out, whole(other, settings.other_pairs), tuple(asked))


def _tokens(pair: Instruction, tokenizer: Any) -> int:
    return len(tokenizer(pair.prompt + pair.completion + tokenizer.eos_token)["input_ids"])


def _mixed(pairs: Iterable[Instruction]) -> list[Instruction]:
    """The pairs in an order that has nothing to do with where they come from, the same on every machine."""
    return sorted(pairs, key=lambda pair: hashlib.sha256(pair.name.encode()).digest())


def _prompt(text: str, tokenizer: Any) -> str:
    return question_of(text.strip(), tokenizer) if tokenizer.chat_template else text
