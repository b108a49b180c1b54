"""Packages that an extra brings: all that are missing in one message, with one extra, true in a clone and elsewhere."""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path

import pytest

from balora_plugin import findings
from balora_plugin.commands import main
from balora_plugin.findings import Finding, distinct, in_one_message

ROOT = Path(__file__).parents[1]


@pytest.fixture
def without(monkeypatch):
    """Takes packages away, as far as anybody looks for them."""

    def take(*names):
        found = util.find_spec
        monkeypatch.setattr(findings, "find_spec", lambda name: None if name in names else found(name))

    return take


def test_compare_names_everything_and_one_extra_once(without, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    without("jinja2", "matplotlib", "datasets", "trl")
    words = ["--model", "some/model", "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out"]
    assert main(["compare", *words]) == 2
    said = capsys.readouterr().err
    assert "needs datasets, jinja2, matplotlib, trl: install balora-plugin with its extra [compare]" in said
    assert re.findall(r"\[(\w+)\]", said) == ["compare", "compare"] and "pip install '.[compare]'" in said


def test_nothing_is_installed_from_an_index_that_does_not_have_it():
    for folder in ("balora_plugin", "docs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".ipynb"):
                assert not re.search(r"pip install '?balora-plugin", path.read_text(encoding="utf-8")), path


def test_a_setting_is_said_once_and_the_first_finding_says_it():
    one, again, other = Finding("r", 0, "is low"), Finding("r", 0, "is odd"), Finding("r", 1, "is odd")
    free, same = Finding("", None, "no data"), Finding("", None, "no data")
    assert distinct([one, again, other, free, same, Finding("", None, "no model")]) == (
        one,
        other,
        free,
        Finding("", None, "no model"),
    )
    assert in_one_message([one]) == "r: 0 is low."
    assert in_one_message([one, free]) == "2 settings cannot be trained as they stand:\n  - r: 0 is low.\n  - no data."
