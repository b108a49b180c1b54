"""Train a LLaMA-Factory YAML with the terms, or write one to start from.

  balora llamafactory init
  balora llamafactory train ba_lora.yaml
  balora llamafactory train ba_lora.yaml learning_rate=5e-5 ba_lora.lambda_consistency=0.5

train takes what `llamafactory-cli train` takes, a YAML and key=value, with a `ba_lora:` block in it; settings that
would not train are listed before the model loads. FORCE_TORCHRUN=1, NPROC_PER_NODE and its other variables mean the
same. What is saved is a plain LoRA: `llamafactory-cli export` and `chat` take it as any other. The web UI starts a
command of its own, in which there are no terms.
"""

from __future__ import annotations

import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

from ._options import Argument, Option, Values

HELP = "train a LLaMA-Factory YAML with the terms, write a starter"

PARAMETERS = (
    Argument("what", metavar="COMMAND", help="train or init"),
    Argument("words", nargs=-1, required=False, metavar="[FILE]", help="the YAML, and of train key=value behind it"),
    Option("--force", is_flag=True, help="init: overwrite an existing file"),
)


def run(args: Values) -> int:
    """Runs the subcommand; returns its exit code."""
    if args.what == "init":
        return _init(args.words[0] if args.words else "ba_lora.yaml", force=args.force)
    if args.what != "train":
        raise ValueError(f"{args.what} is not known: write train or init. LLaMA-Factory's own command has the others.")
    if find_spec("llamafactory") is None:
        raise ImportError("LLaMA-Factory is not installed: pip install llamafactory==0.9.5")
    from ..hosts.llamafactory.train import NotTrainable, start_training

    try:
        return start_training(args.words)
    except NotTrainable as error:  # a line a setting, where other errors are one
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except Exception:  # of a training, hours into which one line says too little
        traceback.print_exc()
        return 2


def _init(name: str, *, force: bool) -> int:
    from ..hosts.llamafactory.starter import llamafactory_starter

    path = Path(name)
    if path.exists() and not force:
        raise ValueError(f"{path} exists: name another file, or pass --force.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(llamafactory_starter(str(path)), encoding="utf-8")
    print(f"wrote {path}; next: balora llamafactory train {path}")
    return 0
