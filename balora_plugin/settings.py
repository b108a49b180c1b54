"""What is known of a setting, said once as a dataclass field: checks, Axolotl's block and the docs are made of it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

TASKS = ("nlg", "nlu")  # terms over next-token positions of language models; over the samples of classifiers

_FAMILY = {"nlg": "Language models only.", "nlu": "Classifiers only."}
Kind = Literal["choice", "number", "integer", "flag", "path", "data", "numbers"]
_T = TypeVar("_T")

LARGEST_INTEGER = (1 << 31) - 1  # every kernel takes it; a count beyond it is no count of anything here


@dataclass(frozen=True)
class Only:
    """Says that a setting has a meaning for one family of terms alone.

    Args:
        task: `"nlg"` or `"nlu"`: the family that reads it.
        why: Why the other one does not; part of the error.
        neutral: What may be written for the other one too, beside the default.
    """

    task: str
    why: str
    neutral: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One setting, whose name is that of its dataclass field.

    Args:
        kind: `"choice"` (of names), `"number"`, `"integer"`, `"flag"` (True or False), `"path"`, `"data"` or
            `"numbers"` (a mapping of some of `keys` to numbers).
        default: What it is where nothing is said. None: it may be left out, and `presets` or the code decides.
        help: What it means, in the words of the docs and of Axolotl's schema.
        choices: The names of a choice.
        keys: What numbers may be given for.
        minimum: The smallest value of a number, of each of several, or of an integer; None: any.
        exclusive: The minimum itself is refused.
        maximum: The largest value of what has a minimum; None: any number, whole ones up to [`LARGEST_INTEGER`].
        presets: {preset: (what it is for language models, for classifiers)} where it is left out.
        only: The family that reads it; None: both.
    """

    kind: Kind
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    minimum: float | None = None
    exclusive: bool = False
    maximum: float | None = None
    presets: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    only: Only | None = None

    @property
    def optional(self) -> bool:
        """True if None stands for "left out"."""
        return self.default is None

    @property
    def values(self) -> str:
        """What may be written, in words."""
        if self.kind == "choice":
            *others, last = [f"`{name}`" for name in self.choices]
            return f"{', '.join(others)} or {last}" if others else last
        if self.kind == "numbers":
            return f"mapping of {', '.join(f'`{key}`' for key in self.keys)}, or some of them, to a number{self.bounds}"
        words = {"number": "number", "integer": "whole number", "flag": "true or false", "data": "file or data set"}
        return words.get(self.kind, self.kind) + self.bounds

    @property
    def bounds(self) -> str:
        """The smallest and the largest value, in words that follow "number"; empty where there is none."""
        if self.minimum is None:
            return ""
        if self.maximum is not None and not self.exclusive:
            return f" from {self.minimum:g} to {self.maximum:g}"
        most = "" if self.maximum is None else f" and <= {self.maximum:g}"
        return f" {'>' if self.exclusive else '>='} {self.minimum:g}{most}"

    @property
    def largest(self) -> float:
        """The largest value of a number or an integer."""
        if self.maximum is not None:
            return self.maximum
        return LARGEST_INTEGER if self.kind == "integer" else sys.float_info.max

    @property
    def meaning(self) -> str:
        """`help`, after the family that it is for where it is for one alone."""
        return self.help if self.only is None else f"{_FAMILY[self.only.task]} {self.help}"

    def preset_value(self, preset: str, task: str) -> Any:
        """Returns what it is where it is left out, for `task` "nlg" or "nlu"; None if no preset says."""
        return self.presets[preset][TASKS.index(task)] if self.presets else None

    def checked(self, name: str, value: Any) -> Any:
        """Returns `value` as it is kept (a path as plain text).

        Raises:
            ValueError: out of range, or no name of the choice; says the name, the value and what to write.
            TypeError: of another type.
        """
        if value is None and self.optional:
            return None
        if self.kind == "choice" and (not isinstance(value, str) or value not in self.choices):
            raise ValueError(f"{name}={value!r} is not known: write one of {', '.join(map(repr, self.choices))}.")
        if self.kind == "flag" and not isinstance(value, bool):
            raise TypeError(f"{name}={value!r} must be True or False.")
        if self.kind == "number":
            self._check_number(name, value)
        elif self.kind == "integer":
            self._check_integer(name, value)
        if self.kind == "numbers":
            return self._checked_numbers(name, value)
        if self.kind == "path" or (self.kind == "data" and isinstance(value, (str, bytes, os.PathLike))):
            return as_path(name, value)
        if self.kind == "data" and isinstance(value, Mapping):  # which gives its keys where rows are asked for
            raise TypeError(
                f"{name} must be a file, or data of rows, not a {type(value).__name__} of "
                f"{', '.join(map(repr, list(value)[:3])) or 'nothing'}: name one split, as {name}=data['train']."
            )
        if self.kind == "data" and not (hasattr(value, "__len__") and hasattr(value, "__iter__")):
            raise TypeError(
                f"{name}={value!r} must be a file, or data with a length (a datasets.Dataset, a list of rows), not "
                f"{type(value).__name__}."
            )
        return value

    def check_family(self, name: str, value: Any, task: str) -> None:
        """Refuses, by a ValueError, a value that would say nothing for `task` ("nlg" or "nlu")."""
        if self.only is None or self.only.task == task or value in (self.default, *self.only.neutral):
            return
        raise ValueError(f"{name}={value!r} with task={task!r}: {self.only.why}; leave it out.")

    def _checked_numbers(self, name: str, value: Any) -> dict[str, float]:
        if not isinstance(value, Mapping):
            keys = ", ".join(self.keys)
            raise TypeError(
                f"{name}={value!r} must be a mapping of some of {keys} to numbers: {{{self.keys[0]}: 0.3}}."
            )
        for key in value:
            if key not in self.keys:
                known = ", ".join(map(repr, self.keys))
                raise ValueError(f"{name}={dict(value)!r} names {key!r}, which is not known: write some of {known}.")
        if not value:
            raise ValueError(f"{name}={{}} says nothing: name some of {', '.join(self.keys)}, or leave it out.")
        for key, number in value.items():
            self._check_number(f"{name}.{key}", number)
        return {key: float(number) for key, number in value.items()}

    def _check_number(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            hint = " (YAML reads 1e-4 as text: write 1.0e-4)" if isinstance(value, str) else ""
            raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}{hint}.")
        too_large = value > self.largest  # an int knows no inf
        if too_large or not math.isfinite(value) or self._too_small(value):
            raise ValueError(f"{name}={_shown(value)} must be a finite number{self.bounds}.")

    def _check_integer(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} must be a whole number, not {type(value).__name__}.")
        if self._too_small(value):
            raise ValueError(f"{name}={_shown(value)} must be {'>' if self.exclusive else '>='} {self.minimum}.")
        if value > self.largest:
            raise ValueError(f"{name}={_shown(value)} must be <= {self.largest}.")

    def _too_small(self, value: float) -> bool:
        return self.minimum is not None and (value < self.minimum or (self.exclusive and value == self.minimum))


def _shown(value: float) -> str:
    """A number as text; Python itself refuses to write one of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"{'-' * (value < 0)}10**{int(math.log10(abs(value)))}"
    return repr(value)


def setting(kind: Kind, default: Any, **known: Any) -> Any:
    """Returns the dataclass field of a setting; `known` are the other arguments of [`Setting`]."""
    return field(default=default, metadata={"setting": Setting(kind, default, **known)})


def settings_of(config: Any) -> dict[str, Setting]:
    """Returns {name: Setting} of a dataclass or an instance: of its fields those that were made by [`setting`].

    A subclass may give such a field another default: it stays the setting that was declared.
    """
    found = {}
    for each in dataclasses.fields(config):
        known = each.metadata.get("setting") or _inherited(config, each.name)
        if known is not None:
            found[each.name] = known
    return found


def _inherited(config: Any, name: str) -> Setting | None:
    """The setting that the nearest base class declares by this name."""
    for base in (config if isinstance(config, type) else type(config)).__mro__:
        declared = getattr(base, "__dataclass_fields__", {}).get(name)
        if declared is not None and "setting" in declared.metadata:
            return declared.metadata["setting"]
    return None


def documented(config: type[_T]) -> type[_T]:
    """Decorates a dataclass: writes its settings as the Args of its docstring, before "Raises:"."""
    before, raises, after = inspect.cleandoc(config.__doc__ or "").partition("Raises:\n")
    lines = [
        textwrap.fill(
            f"{name} ({each.values}): {each.meaning}",
            width=112,  # help() indents it
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, each in settings_of(config).items()
    ]
    config.__doc__ = "\n".join([before.rstrip(), "", "Args:", *lines, "", raises + after])
    return config


def names_checked(explain: Callable[[str], str]) -> Callable[[type[_T]], type[_T]]:
    """Decorates a dataclass: a keyword that is no field of it is a TypeError that says `explain(keyword)`."""

    def decorate(config: type[_T]) -> type[_T]:
        own: Any = config.__init__
        known = set(inspect.signature(own).parameters)

        @functools.wraps(own)
        def checked(self: _T, *args: Any, **kwargs: Any) -> None:
            for key in kwargs:
                if key not in known:
                    raise TypeError(explain(key))
            own(self, *args, **kwargs)

        config.__init__ = checked  # type: ignore[method-assign, assignment]
        return config

    return decorate


def as_path(key: str, value: Any) -> str | None:
    """A path as plain text, so that settings can be written to a file."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if path is None:
        return None
    if not isinstance(path, str):
        raise TypeError(f"{key}={value!r} must be a path, not {type(value).__name__}.")
    if not path.strip():
        raise ValueError(f"{key}={value!r} names nothing: write a path, or leave it out.")
    return path


def described(data: Any) -> str | None:
    """Returns data as text, for a file of settings or an error: a path or name as it is, an object by what it is."""
    if data is None or isinstance(data, str):
        return data
    return f"<{type(data).__name__} of {len(data)} rows>"
