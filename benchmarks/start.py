"""The start: time, products and energy of one layer of each shape, of experts, and of a whole model.

python -m benchmarks.start                      # 4096 x 4096, 4096 x 11008 and the whole of a 7B model
python -m benchmarks.start --exact              # the exact SVD too: minutes a matrix
python -m benchmarks.start --shapes 1024x1024 --experts 8x352x512 --rank 32
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from balora_plugin.adapter.start.pissa import TOLERANCES, pissa_factors
from balora_plugin.adapter.start.subspace import block_of, leading_triples

from . import measuring
from .measuring import machine, table

# shape -> how many of a Llama of 7B parameters
SEVEN_BILLION = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}
CPU = torch.device("cpu")


def timed(function: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds of one call. On a CPU the processor's, of all threads together: other load does not count."""
    if device.type != "cpu":
        return measuring.timed(function, device)
    began = time.process_time()
    function()
    return time.process_time() - began


def like_power(*shape: int) -> Tensor:
    """Float32 matrices whose singular values are i^-0.5, along Hartley's basis with random signs: no product, no QR."""
    size = min(shape[-2:])
    weight = torch.zeros(shape)
    weight.diagonal(dim1=-2, dim2=-1).copy_(torch.arange(1, size + 1).rsqrt())
    for dim in (-1, -2):
        transformed = torch.fft.fft(weight, dim=dim, norm="ortho")
        weight = transformed.real - transformed.imag
    rows, columns = (torch.randint(0, 2, (side,)) * 2 - 1 for side in shape[-2:])
    return weight * rows[:, None] * columns


def gaussian(*shape: int) -> Tensor:
    """Independent entries: the slowest spectrum that a weight may have, that of no training at all."""
    return torch.randn(*shape)


SPECTRA: dict[str, Callable[..., Tensor]] = {"i^-0.5": like_power, "random": gaussian}


def energy(weight: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    """What B @ A takes of the weight's squared norm."""
    a, b = factors
    return (weight.double().square().sum() - (weight - b @ a).double().square().sum()).item()


def products(weight: Tensor, columns: int, rank: int) -> None:
    """As many columns from either side as the iteration takes, in blocks of its size, and nothing else."""
    block = block_of(rank)
    right, left = (torch.randn(side, block, device=weight.device) for side in weight.shape[:-3:-1])
    for _ in range(columns // (2 * block)):
        weight @ right
        weight.mT @ left


def rows_of(weight: Tensor, rank: int, methods: list[str]) -> Iterator[tuple[str, float, int, float]]:
    """Gives (method, seconds, columns multiplied, energy), and the products alone of the first method."""
    for method in methods:
        found: list[tuple[Tensor, Tensor]] = []
        tolerance = TOLERANCES[method]

        def work(method: str = method, found: list[tuple[Tensor, Tensor]] = found) -> None:
            found.append(pissa_factors(weight, rank, 1.0, method=method))

        seconds = timed(work, weight.device)
        columns = 0 if tolerance is None else leading_triples(weight, rank, tolerance).columns  # a second run, untimed
        yield method, seconds, columns, energy(weight, found[0])
        if method == "pissa":
            alone = timed(functools.partial(products, weight, columns, rank), weight.device)
            yield "its products alone", alone, columns, float("nan")


def matrices(
    shapes: list[tuple[int, ...]], spectra: list[str], rank: int, methods: list[str]
) -> dict[tuple[str, tuple[int, ...]], float]:
    """Prints a table of each shape and spectrum; returns the seconds of `pissa`."""
    seconds = {}
    for shape in shapes:
        for spectrum in spectra:
            measured = list(rows_of(SPECTRA[spectrum](*shape), rank, methods))
            best = max(e for *_, e in measured if e == e)
            took = seconds[spectrum, shape] = measured[0][1]
            print(f"\n**{' x '.join(map(str, shape))}, rank {rank}, singular values: {spectrum}**\n")
            print(
                table(
                    ["", "seconds", "to pissa", "columns multiplied", "energy below the best here"],
                    [
                        [name, f"{s:.2f}", f"{s / took:.2f}", str(c or "-"), f"{1 - e / best:.1e}" if e == e else "-"]
                        for name, s, c, e in measured
                    ],
                ),
                flush=True,
            )
    return seconds


def rows_of_experts(weight: Tensor, rank: int, methods: Sequence[str]) -> list[tuple[str, float]]:
    """Seconds of one call for all experts, and of one by one by each method."""
    one_by_one = weight[:4]
    rows = [("pissa, one call", timed(lambda: pissa_factors(weight, rank, 1.0), weight.device))]
    for method in methods:
        share = timed(functools.partial(_one_by_one, one_by_one, rank, method), weight.device)
        rows.append(
            (f"{method}, one by one ({len(one_by_one)} of them, scaled)", share * len(weight) / len(one_by_one))
        )
    return rows


def experts(shape: tuple[int, ...], rank: int) -> None:
    """Prints one call for all experts against one by one, exactly and to the tolerance."""
    rows = rows_of_experts(like_power(*shape), rank, ("pissa", "pissa_exact"))
    together = rows[0][1]
    print(f"\n**{shape[0]} experts of {shape[1]} x {shape[2]}, rank {rank}**\n")
    print(table(["", "seconds", "to one call"], [[n, f"{s:.2f}", f"{s / together:.2f}"] for n, s in rows]))


def _one_by_one(weights: Tensor, rank: int, method: str) -> None:
    for weight in weights:
        pissa_factors(weight, rank, 1.0, method=method)


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape_of, nargs="*", default=list(SEVEN_BILLION))
    parser.add_argument("--spectra", nargs="*", choices=SPECTRA, default=list(SPECTRA))
    parser.add_argument("--experts", type=shape_of, help="for example 64x1408x2048")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--exact", action="store_true", help="measure the exact SVD as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"`python -m benchmarks.start` on {machine(CPU)}, float32, processor seconds")
    methods = ["pissa", "pissa_fast", *(["pissa_exact"] if options.exact else [])]
    seconds = matrices(options.shapes, options.spectra, options.rank, methods)
    if options.experts:
        experts(options.experts, options.rank)
    if set(options.shapes) >= set(SEVEN_BILLION):
        whole = {
            spectrum: sum(count * seconds[spectrum, shape] for shape, count in SEVEN_BILLION.items())
            for spectrum in options.spectra
        }
        said = ", ".join(f"{total / 60:.0f} min with {spectrum} spectra" for spectrum, total in whole.items())
        print(f"\nThe whole start of a 7B model (224 matrices) by these: {said}.")


if __name__ == "__main__":
    main()
