"""The console command `balora`. Each module here whose name has no underscore in front is a subcommand.

It defines `HELP` (one line), `PARAMETERS` (click's arguments and options) and `run(args) -> exit code`, and imports
what is heavy in `run`. A module is imported when its subcommand is named, all of them for the list in the help.

Exit codes: 0 all is well, 1 what was looked at differs or is not usable as it is, 2 the command could not do its work:
one line on stderr says why, and with --debug the traceback; 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

import click

from .._version import __version__
from ._options import Subcommand, as_lists
from ._others import said_by_others

DEBUG = "print the traceback of an error as well, and what other packages say"
INTERRUPTED = 130  # as shells say it: 128 + SIGINT
LONGEST = 1000  # characters of an error: of tensors that do not fit torch lists all


class _Asked:
    """What --debug, before or after the subcommand, has asked for."""

    debug = False


class _Subcommands(click.Group):
    """The modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns their names."""
        return sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns one of them, imported now; None for a name that is none."""
        return _command_of(cmd_name, subcommand(cmd_name)) if cmd_name in self.list_commands(ctx) else None


def subcommand(name: str) -> ModuleType:
    """Returns a subcommand's module, imported now."""
    return importlib.import_module(f"{__name__}.{name}")


def command_line() -> click.Group:
    """Returns the whole command line."""
    group = _Subcommands(
        "balora",
        help="Check, convert and ship BA-LoRA adapters.",
        no_args_is_help=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    click.version_option(__version__, message=f"balora-plugin {__version__}")(group)
    _with_debug(group)
    return group


def _command_of(name: str, module: ModuleType) -> click.Command:
    @click.pass_context
    def call(ctx: click.Context, /, **values: object) -> int:
        with said_by_others(shown=ctx.ensure_object(_Asked).debug):
            code: int = module.run(as_lists(values))
        return code

    command = Subcommand(name, params=list(module.PARAMETERS), callback=call, help=module.__doc__)
    command.short_help = module.HELP
    _with_debug(command)
    return command


def _with_debug(command: click.Command) -> None:
    def note(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.ensure_object(_Asked).debug |= value

    command.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, callback=note, help=DEBUG))


def main(argv: Sequence[str | os.PathLike[str]] | None = None) -> int:
    """Runs a subcommand; whatever it fails of is one line on stderr and exit code 2, with --debug a traceback too."""
    asked = _Asked()
    words = sys.argv[1:] if argv is None else [os.fspath(word) for word in argv]
    try:
        with command_line().make_context("balora", list(words), obj=asked) as context:
            code: int = context.command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "balora"
        said = one_line(error.format_message()).rstrip(".")
        print(f"Error: {said} (see {where} --help)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError):  # the reader has gone: else Python complains when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if asked.debug:
            traceback.print_exc()
        print(f"Error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return code


def one_line(text: str) -> str:
    """Returns a text without its line breaks, cut where it is very long."""
    text = " ".join(text.split())
    return f"{text[:LONGEST]} ..." if len(text) > LONGEST else text


def in_one_line(error: Exception) -> str:
    """Returns an error's text; of kinds that are not written for users their name, and where to look, as well."""
    text = one_line(str(error))
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (--debug shows where)"
