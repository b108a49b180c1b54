"""Do what `axolotl ba-lora` does, without the seconds that Axolotl itself takes to start.

  balora axolotl init
  balora axolotl migrate config.yaml
  balora axolotl schema

init writes a starter YAML with the recommended setting; migrate writes a LoRA or QLoRA YAML for BA-LoRA and says what
was changed and why; schema prints the JSON schema of the ba_lora: block, or writes it to FILE.
"""

from __future__ import annotations

import click

from ..findings import check_extra
from ._options import Argument, Option, Values, Words

HELP = "write a starter YAML for Axolotl, migrate a LoRA's, print the schema"

PARAMETERS = (
    Argument("what", type=Words(("init", "migrate", "schema")), metavar="COMMAND", help="init, migrate or schema"),
    Argument("file", required=False, metavar="[FILE]", help="what to write, or of migrate what to read"),
    Option("--output", metavar="FILE", help="migrate: what to write; FILE with .ba_lora before its end"),
    Option("--force", is_flag=True, help="overwrite an existing file"),
)


def run(args: Values) -> int:
    """Runs the subcommand; returns its exit code."""
    check_extra("axolotl", ("pydantic",), "balora axolotl")
    words = [args.what, *([args.file] if args.file else [])]
    words += ["--output", args.output] if args.output else []
    words += ["--force"] if args.force else []
    from ..hosts.axolotl.cli import main

    try:
        code = main.main(args=words, prog_name="balora axolotl", standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None
    return code if isinstance(code, int) else 0
