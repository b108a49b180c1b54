"""What an adapter leaves out, added to what its config leaves out already."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .config import BaLoraConfig


def any_of(names: Iterable[str]) -> str:
    """Returns these names as the alternatives of a regular expression."""
    return "|".join(map(re.escape, names))


def excluded_pattern(excluded: Iterable[str] | str | None) -> str:
    """Returns exclude_modules, as PEFT reads them, as a regular expression for whole names; empty for none."""
    if not excluded:
        return ""
    return excluded if isinstance(excluded, str) else rf"(?:.*\.)?(?:{any_of(sorted(excluded))})"


def exclude(config: BaLoraConfig, more: list[str] | str) -> None:
    """Adds to what a config (in place) leaves out: names as PEFT takes them in a list, or a regular expression.

    It stays a list where both are one.
    """
    given = config.exclude_modules
    if not more:
        return
    if not isinstance(more, str) and not isinstance(given, str):
        config.exclude_modules = sorted({*(given or ()), *more})
        return
    own, added = excluded_pattern(given), excluded_pattern(more)
    config.exclude_modules = f"(?:{added})|(?:{own})" if own else added
