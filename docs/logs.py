"""Writes the table of BA-LoRA's own keys in docs/logs.md, of `LOG_KEYS`: `python docs/logs.py`."""

from __future__ import annotations

from pathlib import Path

from balora_plugin.training.log_keys import LOG_KEYS, PREFIX, LogKey

PATH = Path(__file__).with_suffix(".md")
HEAD = """\
| key | what it is | logged with | unit | sign | eval | healthy |
|---|---|---|---|---|---|---|
"""
START, END = "## BA-LoRA's keys\n\n", "\n*Eval*"
EVALUATED = {"both": "yes", "train": "no", "eval": "only", "end": "end"}


def row(name: str, key: LogKey) -> str:
    """A key's line."""
    shown = f"`{'eval_' if key.where == 'eval' else ''}{PREFIX}{name}`"
    cells = (shown, key.meaning, key.needs, key.unit or "none", key.sign, EVALUATED[key.where], key.healthy)
    return f"| {' | '.join(cells)} |\n"


def page(written: str) -> str:
    """The text of docs/logs.md, `written`, with its table made anew."""
    before, _, rest = written.partition(START)
    after = rest[rest.index(END) :]
    return before + START + HEAD + "".join(row(name, key) for name, key in LOG_KEYS.items()) + after


if __name__ == "__main__":
    PATH.write_text(page(PATH.read_text(encoding="utf-8")), encoding="utf-8")
