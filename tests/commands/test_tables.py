"""Tables of commands: drawn on a terminal, Markdown wherever they are piped to."""

from __future__ import annotations

import pytest

from balora_plugin.commands import _output
from balora_plugin.commands._output import show_markdown

TABLE = "| method | loss |\n|---|---|\n| lora | 1.5 |\n\n- few rows\n"


def test_what_is_piped_is_the_markdown(capsys):
    show_markdown(TABLE)
    assert capsys.readouterr().out == TABLE


def test_a_terminal_gets_a_drawn_table(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(_output.sys.stdout, "isatty", lambda: True)
    show_markdown(TABLE)
    drawn = capsys.readouterr().out
    assert "|---|" not in drawn and "─" in drawn and "lora" in drawn and "few rows" in drawn
    monkeypatch.setattr(_output, "find_spec", lambda name: None)
    show_markdown(TABLE)
    assert capsys.readouterr().out == TABLE
