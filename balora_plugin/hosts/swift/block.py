"""The variable BA_LORA: RegularizerConfig's fields and `start_from`, as the YAML's `ENV:` or the shell has them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ...config import RegularizerConfig, nearest_setting
from ...findings import Finding
from ...settings import settings_of
from .names import VARIABLE

_START_FROM = "start_from"
_ADAPTERS = {  # what is no term, under other hosts' names of it
    "r": "lora_rank",
    "rank": "lora_rank",
    "lora_r": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "init_lora_weights": "init_weights",
}


def read_block(text: str | None) -> dict[str, Any] | None:
    """Returns what BA_LORA says; None where it is not set, or empty.

    ms-swift makes text of a mapping under `ENV:` as Python prints it; a shell holds JSON, or YAML in one line.

    Raises:
        ValueError: it is no mapping.
    """
    if text is None or not text.strip():
        return None
    for read in (json.loads, ast.literal_eval, yaml.safe_load):
        try:
            found = read(text)
        except (ValueError, SyntaxError, yaml.YAMLError):
            continue
        if isinstance(found, dict):
            return found
    raise ValueError(f"{VARIABLE}: {text[:60]!r} must be a mapping: {{lambda_consistency: 0.3}}.")


def of_settings(block: Mapping[str, Any], task: str) -> Iterator[Finding]:
    """Finds everything that is wrong in BA_LORA; `task`: nlg or nlu."""
    known, good = settings_of(RegularizerConfig), {}
    for key, value in block.items():
        try:
            if key in known:
                good[key] = known[key].checked(key, value)
            elif key != _START_FROM:
                yield _unknown(str(key), value)
            elif not isinstance(value, str) or not value.strip():
                yield Finding(f"{VARIABLE}.{key}", repr(value), "is no path or name of a model")
        except (ValueError, TypeError) as error:
            yield Finding("", None, f"{VARIABLE}.{error}".removesuffix("."))
    try:
        RegularizerConfig.from_dict(good).resolved(task)
    except (ValueError, TypeError) as error:
        yield Finding("", None, f"{VARIABLE}.{error}".removesuffix("."))


def _unknown(key: str, value: Any) -> Finding:
    name = f"{VARIABLE}.{key}"
    if key == "compile":
        return Finding(
            name, value, "is not supported in ms-swift, which checkpoints as no graph can", "remove it", False
        )
    own = _ADAPTERS.get(key) or (key if key.startswith("lora_") else None)
    near = nearest_setting(key, [_START_FROM])
    if own:
        hint = f"the adapter's own keys are ms-swift's: write {own} beside tuner_type"
    else:
        hint = f"did you mean {near}?" if near else f"write some of {', '.join(settings_of(RegularizerConfig))}"
    return Finding(name, repr(value), "is not a setting", hint)


def terms_and_source(block: Mapping[str, Any] | None) -> tuple[RegularizerConfig, str | None]:
    """Returns the terms and the full-precision model that A0 and B0 are taken from; defaults where nothing is said."""
    values = dict(block or {})
    source = values.pop(_START_FROM, None)
    return RegularizerConfig.from_dict(values), source
