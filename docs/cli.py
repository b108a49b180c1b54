"""Writes docs/cli.md, what `balora --help` and each subcommand's say: `python docs/cli.py`."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import click

from balora_plugin.commands import command_line, main

PATH = Path(__file__).with_suffix(".md")

HEAD = """\
# Command line

What the command `balora` prints of itself (`python docs/cli.py` writes this page). Exit codes: 0 all is well; 1 what
was looked at differs, or is not usable as it is; 2 the command could not do its work; 130 interrupted. Whatever it
fails of is one line; `--debug` prints the traceback as well. `axolotl ba-lora` is [Axolotl's own](train.md#axolotl).
"""


def help_of(*words: str) -> str:
    """What `balora WORDS --help` prints, 100 columns wide."""
    said = StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with redirect_stdout(said):
            main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.__setitem__("COLUMNS", before)
    return said.getvalue().strip()


def names() -> list[str]:
    """The subcommands."""
    group = command_line()
    return group.list_commands(click.Context(group))


def page() -> str:
    """The whole text of docs/cli.md: a section a subcommand."""
    parts = [HEAD, f"```text\n{help_of()}\n```\n"]
    parts += [f"## balora {name}\n\n```text\n{help_of(name)}\n```\n" for name in names()]
    return "\n".join(parts)


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
