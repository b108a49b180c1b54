"""Rows of language data as a tokenizer's model reads them: by its chat template, or as plain text where it has none."""

from __future__ import annotations

from typing import Any

_BETWEEN = "\n\n"  # what stands between messages where there is no template


def as_trained(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns a row as it can be trained on: messages as they are, or a plain prompt and completion of them.

    Without a template the last answer is the completion, and what stands before it the prompt.
    """
    if tokenizer.chat_template is not None or is_plain(row):
        return row
    messages = row.get("messages") or [*row["prompt"], *row["completion"]]
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    before = "".join(message["content"] + _BETWEEN for message in messages[:last])
    answer = messages[last]["content"]
    return {"prompt": before, "completion": answer} if before else {"text": answer}


def text_of(row: dict[str, Any], tokenizer: Any) -> str:
    """Returns a row as the text that the model reads."""
    row = as_trained(row, tokenizer)
    if "text" in row:
        return str(row["text"])
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"] + row["completion"])
    messages = row.get("messages") or [*row["prompt"], *row["completion"]]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def is_plain(row: dict[str, Any]) -> bool:
    """Returns whether a row is read without the chat template, even where there is one: text, or a prompt of text."""
    return "text" in row or isinstance(row.get("prompt"), str)


def question_of(text: str, tokenizer: Any, *, plain: bool = False) -> str:
    """Returns a question as the model is asked it: as a user's message where there is a template.

    `plain`: it was trained on rows without the template ([`is_plain`]), and is asked so.
    """
    if plain or tokenizer.chat_template is None:
        return text
    message = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
