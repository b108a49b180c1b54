"""The randomised PiSSA start against the exact one, time and energy: `python -m benchmarks.start`"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from balora_plugin.adapter.start.pissa import pissa_factors


def falling_spectrum(size: int) -> Tensor:
    """A (size, size) float32 matrix whose singular values fall like i^-0.5."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    return (u * torch.arange(1, size + 1, dtype=torch.float64).rsqrt() @ v.T).float()


def timed(function: Callable[[], tuple[Tensor, Tensor]], repeats: int) -> tuple[float, tuple[Tensor, Tensor]]:
    """Median seconds and the last result."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), result


def energy(factors: tuple[Tensor, Tensor]) -> float:
    """Squared Frobenius norm of B @ A."""
    a, b = (x.double() for x in factors)
    return torch.trace(b.T @ b @ a @ a.T).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weight = falling_spectrum(options.size)
    exact_s, exact = timed(lambda: pissa_factors(weight, options.rank, 1.0), options.repeats)
    fast_s, fast = timed(lambda: pissa_factors(weight, options.rank, 1.0, fast=True), options.repeats)
    optimal = sum(1 / i for i in range(1, options.rank + 1))
    machine = f"{platform.machine()}, {options.threads} threads"
    print(f"{options.size} x {options.size}, rank {options.rank}, torch {torch.__version__}, {machine}")
    print(f"exact (pissa)      {exact_s:7.2f} s   energy {energy(exact) / optimal:.6f} of optimal")
    print(f"fast (pissa_fast)  {fast_s:7.2f} s   energy {energy(fast) / optimal:.6f} of optimal")
    print(f"ratio              {exact_s / fast_s:7.2f} x")


if __name__ == "__main__":
    main()
