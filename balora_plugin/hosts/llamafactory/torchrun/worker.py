"""One process of several: `torchrun ... worker.py x.yaml [key=value ...]`, as LLaMA-Factory's launcher starts it."""

from __future__ import annotations

import os
import sys

from balora_plugin.hosts.llamafactory.train import NotTrainable, train_here

if __name__ == "__main__":
    try:
        train_here(sys.argv[1:])
    except NotTrainable as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
