"""A teacher cache of many documents: memory, time to open, time to look up. `python -m benchmarks.cache_index`

Keys are random, rows are holes in sparse files: nothing but indexes is read where a cache is opened, and a row where a
document is looked up.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from balora_plugin.teacher.files import INDEXES, CacheFiles

from .measuring import machine, peak_memory, table

SHARD = 1 << 16  # documents of a pair of files, as a run writes them where rows are small


def synthetic(directory: Path, documents: int, seed: int = 0) -> None:
    """Pairs of files of one row a document, four bytes each."""
    draw = np.random.default_rng(seed)
    kind = INDEXES[2]
    crc = zlib.crc32(bytes(4))
    for at, begin in enumerate(range(0, documents, SHARD)):
        count = min(SHARD, documents - begin)
        index = np.zeros(count, kind)
        index["key"] = draw.integers(0, 256, (count, 16), np.uint8)
        index["start"], index["rows"], index["crc"] = np.arange(count), 1, crc
        size, data = INDEXES[1].itemsize, index.tobytes()
        index["check"] = [zlib.crc32(data[i : i + size]) for i in range(0, len(data), kind.itemsize)]
        path = directory / f"{at:032x}.npy"
        np.lib.format.open_memmap(path, "w+", "<u2", (count, 2)).flush()  # a hole: nothing is written
        np.save(directory / f"{at:032x}.index.npy", index)


def some_keys(directory: Path, count: int) -> list[bytes]:
    """Keys of documents of all pairs, in no order."""
    draw = np.random.default_rng(1)
    paths = sorted(directory.glob("*.index.npy"))
    found = []
    for chosen in draw.integers(len(paths), size=count):
        keys = np.load(paths[chosen], mmap_mode="r")["key"]
        found.append(keys[draw.integers(len(keys))].tobytes())
    return found


def opened(directory: Path) -> CacheFiles:
    files = CacheFiles(directory)
    files.shape = (2,)
    files.refresh()
    return files


def microseconds(function: Callable[[bytes], object], keys: Sequence[bytes]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    for key in keys:
        function(key)
    return (time.process_time() - began) / len(keys) * 1e6


def row(documents: int) -> tuple[str, ...]:
    """Documents; MiB that stay, and at most while it opens; seconds of the processor; microseconds of look-ups."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        synthetic(directory, documents)
        began = time.process_time()
        files = opened(directory)
        seconds = time.process_time() - began
        keys = some_keys(directory, 2000)
        known = microseconds(files.__contains__, keys)
        unknown = microseconds(files.__contains__, [key[::-1] for key in keys])
        first = microseconds(files.read, keys)
        assert len(files) == documents and all(files.read(key) is not None for key in keys[:10])
        held = files.memory() / 2**20
        del files
        peak = peak_memory(lambda: len(opened(directory)), torch.device("cpu"))
    figures = (held, peak, seconds, known, unknown, first)
    return (f"{documents:,}", *(f"{figure:.3g}" if figure < 1000 else f"{figure:.0f}" for figure in figures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    options = parser.parse_args()
    print(f"`python -m benchmarks.cache_index` on {machine(torch.device('cpu'))}, numpy {np.__version__}\n")
    header = (
        "documents",
        "MiB held",
        "MiB at most",
        "s to open",
        "µs, is it here",
        "µs, is not",
        "µs to read a document",
    )
    print(table(header, [row(documents) for documents in options.documents]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
