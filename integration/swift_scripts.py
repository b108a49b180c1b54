"""ms-swift's scripts and YAMLs through the checks of its arguments: `python -m integration.swift_scripts FOLDER`.

Prints what is accepted and refused, with all reasons. ms-swift itself is not needed, nor is any model.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from balora_plugin.findings import Finding
from balora_plugin.hosts.swift.checks import findings_in
from balora_plugin.hosts.swift.names import TUNER

_COMMANDS = {("swift", "sft"), ("swift", "pt")}


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if re.fullmatch(r"-?\d+", text) else number


def values_of(words: list[str]) -> dict[str, Any]:
    """Returns a command line's options by name: one value as it is, several as a list, none as true."""
    found: dict[str, list[Any]] = {}
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            found[name] = [_value(value)] if value else []
        elif found:
            found[list(found)[-1]].append(_value(word))
    return {name: values[0] if len(values) == 1 else values or True for name, values in found.items()}


def trainings_in(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the arguments of each supervised training that a script or a YAML begins."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        values = yaml.safe_load(text)
        if isinstance(values, dict) and "dataset" in values and "rlhf_type" not in values:
            yield values
        return
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation over several lines
            continue
        for index in range(len(words) - 1):
            if tuple(words[index : index + 2]) in _COMMANDS:
                yield values_of(words[index + 2 :])


def is_lora(values: dict[str, Any]) -> bool:
    """Returns whether it trains a LoRA, which is what ms-swift trains where nothing is said."""
    tuner = values.get("tuner_type", values.get("train_type", "lora"))
    return tuner == "lora" and "rlhf_type" not in values


def survey(folder: Path) -> dict[str, list[Finding]]:
    """Returns {script: what is refused of it} of every LoRA training in a folder, made BA-LoRA's by its tuner_type."""
    found: dict[str, list[Finding]] = {}
    for path in sorted([*folder.rglob("*.sh"), *folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        for index, values in enumerate(trainings_in(path)):
            if is_lora(values):
                name = f"{path.relative_to(folder).as_posix()}{f' ({index + 1})' if index else ''}"
                found[name] = list(findings_in({**values, "tuner_type": TUNER}, None))
    return found


def main(folder: str) -> None:
    found = survey(Path(folder))
    for name, findings in found.items():
        if findings:
            print(f"refused   {name}")
            for finding in findings:
                print(f"            {finding.sentence()}")
    accepted = [name for name, findings in found.items() if not findings]
    print(f"{len(accepted)} of {len(found)} are accepted")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else os.environ["SWIFT_EXAMPLES"])
