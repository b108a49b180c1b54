"""Writes docs/settings.md, the table of RegularizerConfig's settings: `python docs/settings.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from balora_plugin.config import PRESETS, RegularizerConfig
from balora_plugin.settings import Setting, settings_of

PATH = Path(__file__).with_suffix(".md")

HEAD = """\
# Settings of the terms

These are the fields of `RegularizerConfig`, and the keys of the `ba_lora:` block of an Axolotl YAML. A setting that is
left out has its default; where that depends on `preset`, both values are given, and those for classifiers where they
differ. The block has a few keys of its own beside these: `axolotl ba-lora schema` prints all.

Each setting is declared once, in `balora_plugin/config.py`; `python docs/settings.py` makes this file from there.

| setting | values | default | meaning |
|---|---|---|---|
"""


def default_of(known: Setting) -> str:
    """What a setting is where it is left out, in words: one value, or one for each preset and family of terms."""
    if not known.presets:
        return "not set" if known.default is None else _shown(known.default)
    values = {preset: _of_families(known, *known.presets[preset]) for preset in PRESETS}
    if len(set(values.values())) == 1:
        return values[PRESETS[0]]
    return "; ".join(f"preset `{preset}`: {value}" for preset, value in values.items())


def _of_families(known: Setting, nlg: Any, nlu: Any) -> str:
    if known.only is not None:
        return _shown(nlg if known.only.task == "nlg" else nlu)
    return _shown(nlg) if nlg == nlu else f"{_shown(nlg)}, for classifiers {_shown(nlu)}"


def _shown(value: Any) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def page() -> str:
    """The whole text of docs/settings.md: a row a setting."""
    rows = [
        (f"`{name}`", known.values, default_of(known), known.meaning)
        for name, known in settings_of(RegularizerConfig).items()
    ]
    return HEAD + "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
