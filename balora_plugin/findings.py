"""What a check finds: a setting that a run cannot have as it stands, or a package of an extra that is not there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

_LONG = 80  # of a value that is a block of its own
_IN_WORDS = {True: " (changes what is trained)", False: " (trains the same)", None: ""}


class Finding(NamedTuple):
    """One setting that a run cannot have as it stands, and what to write instead.

    Attributes:
        key: The setting, as it is written.
        value: Its value; None says nothing of it.
        why: What is wrong, a phrase that follows key and value.
        remedy: What to write or to do; empty where there is nothing.
        changes_training: Whether the remedy trains something else than was asked for; None where nothing was (a
            contradiction, a misspelt or a missing key).
    """

    key: str
    value: Any
    why: str
    remedy: str = ""
    changes_training: bool | None = None

    def __str__(self) -> str:
        shown = "" if self.value is None else str(self.value)
        if isinstance(self.value, bool):
            shown = shown.lower()
        elif isinstance(self.value, dict) and len(shown) > _LONG:
            shown = "{...}"
        value = shown and f" {shown}"
        colon = ":" if self.key else ""
        return f"{self.key}{colon}{value} {self.why}{self.remedy and f': {self.remedy}'}{self.in_words()}".strip()

    def sentence(self) -> str:
        """Returns the finding with a full stop where its remedy is no question."""
        text = str(self)
        return text if text.endswith("?") else f"{text}."

    def in_words(self) -> str:
        """Returns what is said of the remedy behind it; empty where nothing can be."""
        return _IN_WORDS[self.changes_training]

    @classmethod
    def of_error(cls, message: str) -> Finding:
        """Returns a message of the form `key: what is wrong: remedy` as a finding."""
        key, colon, rest = message.partition(":")
        named = bool(colon) and " " not in key
        return cls(key if named else "", None, (rest if named else message).strip().removesuffix("."))


def distinct(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Returns each finding once; of several on one key and value the first says it."""
    by_setting: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        by_setting.setdefault((finding.key, str(finding.value) if finding.key else str(finding)), finding)
    return tuple(by_setting.values())


def in_one_message(findings: Sequence[Finding]) -> str:
    """Returns a single finding as its sentence, several as a list of theirs: what a host's error says."""
    if len(findings) == 1:
        return findings[0].sentence()
    lines = "".join(f"\n  - {finding.sentence()}" for finding in findings)
    return f"{len(findings)} settings cannot be trained as they stand:{lines}"


def how_to_install(extra: str) -> str:
    """Returns what to do for an extra, true of a clone and of an index alike.

    >>> how_to_install("report")
    "install balora-plugin with its extra [report] (in a clone: pip install '.[report]')"
    """
    return f"install balora-plugin with its extra [{extra}] (in a clone: pip install '.[{extra}]')"


def check_extra(extra: str, packages: Iterable[str], purpose: str) -> None:
    """Refuses to go on without packages, all that are missing in one message.

    Raises:
        ImportError: names them, what they are for and the extra that brings them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"{purpose} needs {', '.join(missing)}: {how_to_install(extra)}.")
