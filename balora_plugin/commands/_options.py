"""What a subcommand is made of: arguments and options for click, one table a subcommand."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import click

LARGEST_SEED = (1 << 32) - 1
_NUMBER = re.compile(r"-\.?\d")


class Values(SimpleNamespace):
    """The values of a subcommand's arguments and options, by their names in Python; of several values a list."""


class _NotEmpty(click.Parameter):
    """A value that is written: `--output ""`, as of a shell variable that is not set, names nothing."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Returns what click makes of a value.

        Raises:
            click.BadParameter: it is empty, or one of several is.
        """
        if value == "" or (isinstance(value, (tuple, list)) and "" in value):
            raise click.BadParameter("is empty: write a value, or leave the option out", ctx=ctx, param=self)
        return super().type_cast_value(ctx, value)


class Argument(_NotEmpty, click.Argument):
    """A positional argument that is explained in the help, as options are; with `nargs=-1` one or more."""

    def __init__(self, name: str, *, metavar: str, help: str, **settings: Any) -> None:
        super().__init__([name], metavar=metavar, **settings)
        self._explained = (metavar, help)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Returns the line of the help."""
        return self._explained


class Option(_NotEmpty, click.Option):
    """An option of one value, or a flag."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__([name], **settings)


class Several(Option):
    """An option of one or more values, `--tasks a b c`; given again it takes more."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, multiple=True, **settings)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Returns the line of the help, with a sign that values may follow one another."""
        record = super().get_help_record(ctx)
        return record and (f"{record[0]} ...", record[1])


class Subcommand(click.Command):
    """A command of which options may take several values, and whose help says its text as it was written."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses `args`, of which click's own parser sees one value an option."""
        several = {name for param in self.params if isinstance(param, Several) for name in param.opts}
        return super().parse_args(ctx, one_at_a_time(args, several))

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the help, lines and blank lines kept."""
        formatter.write(f"\n{inspect.cleandoc(self.help or '')}\n")


class Words(click.Choice):
    """One of some words; of a misspelt one the nearest is named."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the word.

        Raises:
            click.BadParameter: it is none of them.
        """
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = difflib.get_close_matches(str(value), [str(each) for each in self.choices], n=1)
            if not near:
                raise
            raise click.BadParameter(f"{error.message} Did you mean {near[0]}?", ctx=ctx, param=param) from None


def one_at_a_time(words: Sequence[str], several: set[str]) -> list[str]:
    """Returns a command line with the options in `several` repeated for each of their values.

    An option's values end where another option begins; a negative number is a value.

    >>> one_at_a_time(["run", "--seeds", "0", "-1", "--keep"], {"--seeds"})
    ['run', '--seeds', '0', '--seeds', '-1', '--keep']
    """
    found: list[str] = []
    option, values = None, 0
    for index, word in enumerate(words):
        if word == "--":
            return [*found, *words[index:]]
        if word.startswith("-") and word != "-" and not _NUMBER.match(word):
            option, values = (word if word in several else None), 0
        elif option is not None:
            found += [option] * bool(values)
            values += 1
        found.append(word)
    return found


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuses seeds that numpy, and with it the Trainer, does not take.

    Raises:
        ValueError: names --seeds and its range.
    """
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"--seeds {seed}: write whole numbers from 0 to {LARGEST_SEED}.")


def as_lists(values: dict[str, Any]) -> Values:
    """Returns what click found, its tuples as lists."""
    return Values(**{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()})
