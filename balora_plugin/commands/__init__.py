"""The console command `balora`. Each module here whose name has no underscore in front is a subcommand.

It defines `HELP` (one line), `add_arguments(parser)` and `run(args) -> exit code`, and imports what is heavy in `run`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, module in subcommands().items():
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str | os.PathLike[str]] | None = None) -> int:
    """Runs a subcommand; what its user got wrong is one line on stderr and exit code 2."""
    args = build_parser().parse_args(None if argv is None else [os.fspath(word) for word in argv])
    try:
        code: int = args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"Error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return code
