"""Text as token documents: windows of a text, or rows of a chat file, and which of their tokens are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .prompts import alpaca
from .rows import read_rows

ROWS = "messages; prompt and completion; instruction (with or without input) and output; or text"


@dataclass(frozen=True)
class TokenDocument:
    """Tokens (n) of one document, and which of them are counted; the first one never is: nothing predicts it."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]

    def cut(self, length: int) -> TokenDocument:
        """Returns its first tokens."""
        return TokenDocument(self.ids[:length], self.counted[:length])


@dataclass(frozen=True)
class Reading:
    """The documents of a file; `cut` of them were longer than the context, `dropped` rows counted nothing in it."""

    documents: tuple[TokenDocument, ...]
    cut: int = 0
    dropped: int = 0

    def remarks(self) -> list[str]:
        """Returns what of the file is not measured, in words."""
        found = [
            (self.cut, "rows are longer than --context and cut"),
            (self.dropped, "rows are left out: all that is counted lies behind --context"),
        ]
        return [f"{count} {what}" for count, what in found if count]


def prefix_token(tokenizer: Any) -> int:
    """Returns the token that stands before a text: the one that begins texts, or else ends them (as lm-eval has it).

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither a bos nor an eos token: set one in its tokenizer_config.json.")


def whole_text(text: str, tokenizer: Any) -> TokenDocument:
    """Returns a text behind the prefix token, every token of it counted."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    prefix = prefix_token(tokenizer)
    ids = ids[1:] if ids[:1] == [prefix] else ids
    return TokenDocument((prefix, *ids), (False, *(True for _ in ids)))


def read_documents(path: str, tokenizer: Any, context: int, limit: int | None = None) -> Reading:
    """Reads the documents of a file: rows of .jsonl or .json, windows of any other text.

    A window is the prefix token and `context` - 1 tokens, each of which is counted once in the whole text; the last may
    be shorter. A row is cut to `context` tokens. `limit`: the first documents alone.

    Raises:
        ValueError: names --drift and what the file lacks.
    """
    if not path.endswith((".jsonl", ".json")):
        documents = _windows(path, tokenizer, context)
        return Reading(tuple(documents[:limit]))
    documents = [
        _of_row(row, tokenizer, f"--drift: {path}, row {number}")
        for number, row in enumerate(read_rows(path, "--drift")[:limit], 1)
    ]
    short = [document.cut(context) for document in documents]
    kept = tuple(document for document in short if any(document.counted))
    if not kept:
        raise ValueError(f"--drift: no row of {path} has a counted token in its first {context}: raise --context.")
    return Reading(kept, sum(len(document.ids) > context for document in documents), len(short) - len(kept))


def _windows(path: str, tokenizer: Any, context: int) -> list[TokenDocument]:
    if not Path(path).is_file():
        raise ValueError(f"--drift: there is no file {path}.")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--drift: {path} is no UTF-8 text: give a text, or rows as .jsonl.") from None
    whole = whole_text(text, tokenizer)
    inside, width = whole.ids[1:], context - 1
    if not inside:
        raise ValueError(f"--drift: {path} holds no token.")
    parts = [inside[start : start + width] for start in range(0, len(inside), width)]
    return [TokenDocument((whole.ids[0], *part), (False, *(True for _ in part))) for part in parts]


def _of_row(row: Mapping[str, Any], tokenizer: Any, where: str) -> TokenDocument:
    """Returns the document of a row: what the assistant says is counted, or all of a text."""
    kinds: list[tuple[tuple[str, ...], Callable[[], TokenDocument]]] = [
        (("messages",), lambda: _chat(row["messages"], tokenizer, where)),
        (("prompt", "completion"), lambda: _answered(row["prompt"], row["completion"], tokenizer)),
        (
            ("instruction", "output"),
            lambda: _answered(alpaca(row["instruction"], row.get("input") or ""), row["output"], tokenizer),
        ),
        (("text",), lambda: whole_text(row["text"], tokenizer)),
    ]
    for keys, make in kinds:
        if not all(key in row for key in keys):
            continue
        odd = next((key for key in keys if key != "messages" and not isinstance(row[key], str)), None)
        if odd is not None:
            raise ValueError(f"{where}: {odd} is no text.")
        return make()
    raise ValueError(f"{where} has the keys {', '.join(row)}: write {ROWS}.")


def _answered(prompt: str, answer: str, tokenizer: Any) -> TokenDocument:
    asked = list(tokenizer(prompt)["input_ids"]) if prompt else []
    if asked and asked[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        asked.pop()
    asked = asked or [prefix_token(tokenizer)]
    said = [*tokenizer(answer, add_special_tokens=False)["input_ids"]]
    said += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return TokenDocument((*asked, *said), (*(False for _ in asked), *(True for _ in said)))


def _chat(messages: Any, tokenizer: Any, where: str) -> TokenDocument:
    """Returns a conversation by the tokenizer's chat template; what stands in the assistant's turns is counted."""
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ValueError(f"{where}: messages is no list of mappings with role and content.")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where} has messages and the tokenizer no chat template: write prompt and completion.")
    pieces: list[tuple[str, bool]] = []
    done = ""
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise ValueError(
                f"{where}: the chat template rewrites earlier turns, so that what was said cannot be told from the "
                "rest: write prompt and completion."
            )
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    if not pieces:
        raise ValueError(f"{where}: no message has the role assistant: nothing would be counted.")
    ids: list[int] = []
    counted: list[bool] = []
    for text, counts in pieces:
        new = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids += new
        counted += [counts] * len(new)
    if counted[0]:  # an answer to nothing
        ids, counted = [prefix_token(tokenizer), *ids], [False, *counted]
    return TokenDocument(tuple(ids), tuple(counted))
