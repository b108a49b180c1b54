"""One section in this process: `python -m benchmarks.gpu.section MODULE:FUNCTION --device cpu --output FILE`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from ..measuring import in_words, quiet


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    quiet()
    module, name = options.target.split(":")
    with open(options.output, "a", encoding="utf-8") as file:

        def add(entry: object) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()

        try:
            for table in getattr(importlib.import_module(module), name)(options.device):
                add(asdict(table))
        except Exception as error:
            traceback.print_exc()
            add({"error": in_words(error)})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
