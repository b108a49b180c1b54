"""Print what ms-swift needs for BA-LoRA, or write it: the plug-in's path, and a YAML to begin with.

  balora swift
  balora swift ba_lora.yaml

ms-swift's own commands do the rest: swift sft ba_lora.yaml, swift export, swift infer. The settings of the terms stand
under ENV: BA_LORA: in the YAML, or in the shell's variable BA_LORA; the adapter's are ms-swift's lora_ keys.
"""

from __future__ import annotations

from pathlib import Path

from ._options import Argument, Option, Values

HELP = "print the plug-in's path and a starter YAML for ms-swift"

PARAMETERS = (
    Argument("file", required=False, metavar="[FILE]", help="what to write the YAML to; left out: it is printed"),
    Option("--path", is_flag=True, help="print the plug-in's path alone, for --external_plugins"),
    Option("--force", is_flag=True, help="overwrite an existing file"),
)


def run(args: Values) -> int:
    """Runs the subcommand; returns its exit code."""
    from ..hosts.swift.names import PLUGIN_FILE
    from ..hosts.swift.starter import swift_starter

    if args.path:
        print(PLUGIN_FILE)
        return 0
    if not args.file:
        print(
            f"# the plug-in: {PLUGIN_FILE}\n# balora swift FILE writes what follows\n\n{swift_starter('FILE')}", end=""
        )
        return 0
    path = Path(args.file)
    if path.exists() and not args.force:
        raise ValueError(f"{path} is there already: write another name, or --force.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(swift_starter(path.name), encoding="utf-8")
    print(f"wrote {path}: swift sft {path}")
    return 0
