"""What a value has to be, in words and as a question: for a file that is read, and before one is trained and written.

Both ask the same, so that nothing is trained that its own file would not be read with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]

LARGEST_RANK = (1 << 31) - 1
_LARGEST_ALPHA = 1e30  # a float32 holds it, and its quotients and products


def is_a(*kinds: type) -> Callable[[Any], bool]:
    """Returns whether a value is of these types; True and False are no numbers."""
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def each(keys: Callable[[Any], bool], values: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Returns whether a value is a mapping of such keys to such values."""
    return lambda value: isinstance(value, dict) and all(keys(k) and values(v) for k, v in value.items())


def or_none(rule: Rule) -> Rule:
    """Returns the rule that allows null as well."""
    return f"{rule[0]} or null", lambda value: value is None or rule[1](value)


def flaw(values: Mapping[str, Any], rules: Mapping[str, Rule], needed: Sequence[str] = ()) -> str | None:
    """Returns which key is missing, or what it is instead of what it has to be; None if all is well."""
    for key, (words, holds) in rules.items():
        if key not in values:
            if key in needed:
                return f"{key} is missing"
        elif not holds(values[key]):
            return f"{key} is {repr(values[key])[:60]}, not {words}"
    return None


def _is_rank(value: Any) -> bool:
    return is_a(int)(value) and 1 <= value <= LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    return is_a(int, float)(value) and 0 < value <= _LARGEST_ALPHA


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_expression(value: Any) -> bool:
    """Returns whether it is text that PEFT can match names with."""
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _are_layers(value: Any) -> bool:
    return all(is_a(int)(layer) and layer >= 0 for layer in (value if isinstance(value, list) else [value]))


TEXT: Rule = ("text", is_a(str))
FLAG: Rule = ("true or false", is_a(bool))
MAPPING: Rule = ("a mapping", is_a(dict))
_NAMES: Rule = or_none(("a list of names", _are_names))
_TARGETS: Rule = or_none(("a list of names, or a regular expression", lambda v: _is_expression(v) or _are_names(v)))
OPTIONS: dict[str, Rule] = {  # of an adapter's those that training and loading do arithmetic or matching with
    "r": (f"a whole number from 1 to {LARGEST_RANK}", _is_rank),
    "lora_alpha": (f"a number > 0 and <= {_LARGEST_ALPHA:g}", _is_alpha),
    "lora_dropout": ("a number from 0 to 1", lambda v: is_a(int, float)(v) and 0 <= v <= 1),
    "use_rslora": FLAG,
    "init_lora_weights": ("text, true or false", is_a(str, bool)),
    "base_model_name_or_path": or_none(TEXT),
    "task_type": or_none(TEXT),
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "target_parameters": _NAMES,
    "modules_to_save": _NAMES,
    "layers_to_transform": or_none(("a whole number >= 0 (the first layer is 0), or a list of them", _are_layers)),
    "rank_pattern": or_none((f"ranks from 1 to {LARGEST_RANK} by regular expression", each(_is_expression, _is_rank))),
    "alpha_pattern": or_none(
        (f"numbers > 0 and <= {_LARGEST_ALPHA:g} by regular expression", each(_is_expression, _is_alpha))
    ),
    "regularizers": MAPPING,
    "start_from": or_none(TEXT),
}
