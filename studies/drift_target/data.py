"""Rows of a JSONL file as a trainer takes them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

PROMPTS, ANSWERS = ("prompt", "question", "instruction"), ("completion", "answer", "response", "output")
TEXTS = ("text", "sentence", "sentence1")


def read(path: Path, limit: int) -> list[dict[str, Any]]:
    """The first `limit` rows of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, limit)]


def first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The value of the first of these columns that there is."""
    return next((str(row[name]) for name in names if row.get(name) is not None), None)


def language_rows(rows: list[dict[str, Any]], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Token ids and labels of an answer after its prompt, or of a whole text; at most `length` tokens."""
    found = []
    for row in rows:
        prompt, answer = first(row, PROMPTS), first(row, ANSWERS)
        text = answer if prompt is not None else first(row, TEXTS)
        if text is None:
            raise SystemExit(f"no text in a row with {', '.join(row)}: name it text, or prompt and completion.")
        before = [] if prompt is None else tokenizer(f"{prompt}\n", add_special_tokens=False)["input_ids"]
        ids = [*before, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:length]
        labels = [-100] * len(before) + ids[len(before) :]
        if len(ids) > len(before) + 1:
            found.append({"input_ids": ids, "labels": labels[: len(ids)]})
    return found


def labelled_rows(rows: list[dict[str, Any]], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Token ids and class of a text, or of a pair of texts; at most `length` tokens."""
    found = []
    for row in rows:
        coded = tokenizer(first(row, TEXTS), row.get("sentence2"), truncation=True, max_length=length)
        found.append({"input_ids": coded["input_ids"], "labels": int(row["label"])})
    return found
