"""The console command `balora`. Each module here whose name has no underscore in front is a subcommand.

It defines `HELP` (one line), `add_arguments(parser)` and `run(args) -> exit code`, and imports what is heavy in `run`.

Exit codes: 0 all is well, 1 what was looked at differs or is not usable as it is, 2 the command could not do its work:
one line on stderr says why, and with --debug the traceback; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

DEBUG = "print the traceback of an error as well"
INTERRUPTED = 130  # as shells say it: 128 + SIGINT
LONGEST = 1000  # characters of an error: of tensors that do not fit torch lists all


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where help is."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line on stderr and exit code 2."""
        self.exit(2, f"Error: {message} (see {self.prog} --help)\n")


def subcommands() -> dict[str, Any]:
    """Returns the subcommands' modules by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    from .._version import __version__

    parser = Parser(prog="balora", description="Check, convert and ship BA-LoRA adapters.")
    parser.add_argument("--version", action="version", version=f"balora-plugin {__version__}")
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, module in subcommands().items():
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        # after the subcommand as well; there without a default, which would undo the one before it
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str | os.PathLike[str]] | None = None) -> int:
    """Runs a subcommand; whatever it fails of is one line on stderr and exit code 2, with --debug a traceback too."""
    args = build_parser().parse_args(None if argv is None else [os.fspath(word) for word in argv])
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("Error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError):  # the reader has gone: else Python complains when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if args.debug:
            traceback.print_exc()
        print(f"Error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return code


def in_one_line(error: Exception) -> str:
    """Returns an error's text; of kinds that are not written for users their name, and where to look, as well."""
    text = " ".join(str(error).split())
    text = f"{text[:LONGEST]} ..." if len(text) > LONGEST else text
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (--debug shows where)"
