"""Answers to MT-Bench's questions in the files that FastChat's judge reads. The judge is the user's own."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .diversity import diversity_figures
from .figures import Figure
from .prompts import alpaca
from .rows import read_rows
from .sides import Side

NAME = "mt_bench"
# FastChat's temperatures by category; others 0.7
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
NEW_TOKENS = 1024  # FastChat's


@dataclass(frozen=True)
class Question:
    """One question: the user's turns, one after the other, each answered."""

    number: int | str
    category: str
    turns: tuple[str, ...]


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """Reads FastChat's question.jsonl.

    Raises:
        ValueError: a row lacks question_id, category or turns.
    """
    questions = []
    for number, row in enumerate(read_rows(path, f"--data {NAME}")[:limit], 1):
        turns = row.get("turns")
        good = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if not good or "question_id" not in row:
            raise ValueError(
                f"--data {NAME}: {path}, row {number} lacks question_id or turns: give FastChat's "
                "mt_bench/question.jsonl."
            )
        questions.append(Question(row["question_id"], str(row.get("category", "")), tuple(turns or ())))
    return questions


@dataclass(frozen=True)
class Speaking:
    """How answers are made: the tokenizer, how many tokens at most, and the seed of what is sampled."""

    tokenizer: Any
    new_tokens: int = NEW_TOKENS
    seed: int = 0


def write_answers(
    questions: Sequence[Question], sides: Sequence[Side], speaking: Speaking, directory: str
) -> list[Figure]:
    """Writes `<directory>/<side>.jsonl`, a line a question; returns how varied the answers are."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {}
    for side in sides:
        lines = []
        texts[side.name] = []
        with side.active() as model:
            for question in tqdm(questions, desc=f"{NAME} ({side.name})", disable=None, leave=False):
                turns = _answers(question, model, speaking)
                texts[side.name].append("\n".join(turns))
                lines.append(json.dumps(_line(question, side.name, turns), ensure_ascii=False))
        Path(directory, f"{side.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return diversity_figures(NAME, texts)


def _line(question: Question, name: str, turns: Sequence[str]) -> dict[str, Any]:
    return {
        "question_id": question.number,
        "answer_id": f"{name}-{question.number}",
        "model_id": name,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
    }


def _answers(question: Question, model: Any, speaking: Speaking) -> list[str]:
    """Returns the answer to each turn, the earlier ones before it."""
    temperature = _TEMPERATURES.get(question.category, 0.7)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    device = model.get_input_embeddings().weight.device
    said: list[dict[str, str]] = []
    for turn in question.turns:
        said.append({"role": "user", "content": turn})
        ids = _prompt_ids(said, speaking.tokenizer).to(device)
        torch.manual_seed(speaking.seed)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=speaking.new_tokens,
            pad_token_id=speaking.tokenizer.pad_token_id or speaking.tokenizer.eos_token_id,
            **sampling,
        )
        text = speaking.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
        said.append({"role": "assistant", "content": text})
    return [each["content"] for each in said if each["role"] == "assistant"]


def _prompt_ids(said: Sequence[dict[str, str]], tokenizer: Any) -> torch.Tensor:
    """Returns the prompt (1, n): by the chat template, or else Alpaca's, one block a turn."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(list(said), tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    text = ""
    for each in said:
        text += alpaca(each["content"]) if each["role"] == "user" else f" {each['content']}\n\n"
    return tokenizer(text, return_tensors="pt")["input_ids"]
