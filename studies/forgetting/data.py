"""Rows and texts of the study: GSM8K's problems, docstrings and instructions that nobody trains on, CrowS-Pairs."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..quickstart.corpus import collect_docstrings

INSTRUCTIONS = Path(__file__).with_name("instructions.jsonl")
MARKS = re.compile(r"<<.*?>>")  # the calculator's, which no user of a model wants to see
IGNORED = -100
ANCHORS = 64  # docstrings that are anchors, none of them measured


@dataclass(frozen=True)
class Row:
    """Token ids, and where the counted ones begin: an answer behind its prompt, or all but the first of a text."""

    ids: tuple[int, ...]
    counted_from: int

    def as_training(self) -> dict[str, Any]:
        """What a collator pads."""
        labels = [IGNORED] * self.counted_from + list(self.ids[self.counted_from :])
        return {"input_ids": list(self.ids), "attention_mask": [1] * len(self.ids), "labels": labels}


@dataclass(frozen=True)
class Pair:
    """Two sentences of CrowS-Pairs, the more and the less stereotyping one."""

    kind: str
    more: Row
    less: Row


def in_chat(tokenizer: Any, text: str) -> str:
    """What a user says in the tokenizer's chat template; without one it stands on a line of its own."""
    message = [{"role": "user", "content": text}]
    if not tokenizer.chat_template:
        return text + "\n"
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def answered(tokenizer: Any, prompt: str, answer: str) -> Row:
    """A prompt and the answer that is to be predicted, ended."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return Row((*before, *after), len(before))


def text_row(tokenizer: Any, text: str, longest: int | None = None) -> Row:
    """A text behind the token that begins one, all of it to be predicted."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return Row((first, *tokenizer(text, add_special_tokens=False)["input_ids"])[:longest], 1)


def problems(path: Path, tokenizer: Any, longest: int, count: int, seed: int = 0) -> list[Row]:
    """`count` of GSM8K's problems of at most `longest` tokens, whole, drawn by the seed."""
    lines = path.read_text(encoding="utf-8").splitlines()
    random.Random(seed).shuffle(lines)
    found: list[Row] = []
    for line in lines:
        problem = json.loads(line)
        prompt = f"Question: {problem['question']}\nAnswer:"
        row = answered(tokenizer, prompt, " " + MARKS.sub("", problem["answer"]))
        if len(row.ids) <= longest:
            found.append(row)
        if len(found) == count:
            return found
    raise ValueError(f"{path} has {len(found)} problems of at most {longest} tokens, {count} were asked for")


def documentation(tokenizer: Any, longest: int, count: int) -> list[Row]:
    """The beginnings of `count` docstrings of the standard library that have `longest` tokens, spread by a hash."""
    spread = sorted(collect_docstrings(), key=lambda entry: hashlib.sha256(entry.name.encode()).digest())
    rows: list[Row] = []
    for entry in spread:
        row = text_row(tokenizer, entry.text, longest)
        if len(row.ids) == longest:
            rows.append(row)
        if len(rows) == count:
            break
    return rows


def write_anchors(path: Path, tokenizer: Any, longest: int, measured: int) -> None:
    """Writes the beginnings of the docstrings that follow the `measured` ones, as `anchor_data` takes them."""
    rows = documentation(tokenizer, longest, measured + ANCHORS)[measured:]
    texts = [tokenizer.decode(row.ids[1:]) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def instructions(tokenizer: Any, longest: int, count: int) -> list[Row]:
    """The first `count` general instructions with their answers; `longest` leaves none out, it cuts the answer."""
    rows = []
    for line in INSTRUCTIONS.read_text(encoding="utf-8").splitlines()[:count]:
        pair = json.loads(line)
        row = answered(tokenizer, in_chat(tokenizer, pair["instruction"]), pair["answer"])
        rows.append(Row(row.ids[: row.counted_from + longest], row.counted_from))
    return rows


def crows(path: Path, tokenizer: Any, per_kind: int) -> list[Pair]:
    """`per_kind` pairs of each kind of bias, drawn once and for all."""
    kinds: dict[str, list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as handle:
        for line in csv.DictReader(handle):
            kinds[line["bias_type"]].append(line)
    drawn = random.Random(0)
    return [
        Pair(kind, text_row(tokenizer, line["sent_more"]), text_row(tokenizer, line["sent_less"]))
        for kind in sorted(kinds)
        for line in drawn.sample(kinds[kind], min(per_kind, len(kinds[kind])))
    ]


def of_seed(pool: Sequence[Row], seed: int, count: int) -> list[dict[str, Any]]:
    """The rows that a seed trains on, in its order. All methods of a seed see the same."""
    rows = list(pool)
    random.Random(seed).shuffle(rows)
    return [row.as_training() for row in rows[:count]]
