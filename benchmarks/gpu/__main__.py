"""All that is measured on a GPU within ten minutes: `make gpu`, or `python -m benchmarks.gpu --output outputs/gpu`

The GPU tests, the loss, layers and steps, attention over packed rows, the start, memory. Writes gpu.md and gpu.json
after every section. With `--device cpu` the same code on small shapes, so that a mistake in it costs no time on a GPU.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import torch

from .running import Plan, run

LIMIT = 590.0  # seconds of a device
PATIENCE = 12  # times as long on a CPU, which costs nothing and may be shared
HERE = "benchmarks.gpu.measured"
PLANS = (
    Plan("tests", "The GPU tests", 150, f"{HERE}:tests"),
    Plan("loss, large vocabulary", "The loss, large vocabulary", 75, f"{HERE}:loss_of_large_vocabulary"),
    Plan("loss, many rows", "The loss, many rows", 60, f"{HERE}:loss_of_many_rows"),
    Plan("layers", "Layers by the compile backend", 80, f"{HERE}:layers"),
    Plan("compiled step", "A training step, compiled", 90, f"{HERE}:compiled_step"),
    Plan("step", "A training step", 45, f"{HERE}:step"),
    Plan("attention", "Attention over packed rows", 45, f"{HERE}:attention"),
    Plan("start", "The start", 45, f"{HERE}:start"),
)


def main() -> int:
    """Returns 1 where a section did not come to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--limit", type=float, help=f"seconds in all (default: {LIMIT:.0f}, {PATIENCE} times on a CPU)")
    names = [plan.name for plan in PLANS]
    parser.add_argument("--sections", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="a folder (default: %(default)s)")
    options = parser.parse_args()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --device cpu (make gpu DEVICE=cpu) runs the same on small shapes.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the section that runs is ended too
    patience = 1 if options.device.type == "cuda" else PATIENCE
    chosen = [plan._replace(seconds=plan.seconds * patience) for plan in PLANS if plan.name in options.sections]
    done = run(chosen, options.device, options.output, options.limit or LIMIT * patience)
    print(f"{options.output / 'gpu.md'}, {options.output / 'gpu.json'}")
    return int(any(section.failure for section in done))


if __name__ == "__main__":
    sys.exit(main())
