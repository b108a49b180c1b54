"""Counts every YAML of example_configs/ and writes its README: `python -m integration.configs`, minutes."""

from __future__ import annotations

import sys

from .counted import Counted, counted
from .page import PAGE, page, trainings


def main() -> int:
    """Returns 1 where a YAML could not be counted."""
    counts: dict[str, Counted | None] = {}
    missing = 0
    for name, values in trainings().items():
        counts[name] = None
        if name != "quickstart.yaml":  # whose model `make quickstart` writes
            try:
                count = counts[name] = counted(values)
                print(f"{name}: {count.gib:.1f} GiB on {count.gpus}, {count.flop / 1e9:.1f} GFLOP a token", flush=True)
            except ValueError as error:
                missing += 1
                print(f"{name}: not counted: {error}", file=sys.stderr)
    PAGE.write_text(page(counts), encoding="utf-8")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
