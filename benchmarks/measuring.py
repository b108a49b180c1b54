"""What the benchmarks share: medians of alternating repeats, peak memory, a Markdown table, the machine in words."""

from __future__ import annotations

import ctypes
import gc
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass
class Measured:
    """Median seconds and peak MiB above what was there before; `note` where it could not run."""

    seconds: float = float("nan")
    peak_mib: float = float("nan")
    note: str = ""
    samples: list[float] = field(default_factory=list)


def measure(functions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Measured]:
    """Every function once for memory and warm-up, then `repeats` rounds in turn: other load on the machine hits all."""
    results = {name: Measured() for name in functions}
    for name, function in functions.items():
        try:
            results[name].peak_mib = peak_memory(function, device)
        except Exception as error:  # a baseline that cannot run here is a line of the table, not the end of it
            results[name].note = in_words(error)
            if device.type == "cuda":  # what did not fit leaves its pieces
                torch.cuda.empty_cache()
    for _ in range(repeats):
        for name, function in functions.items():
            if not results[name].note:
                results[name].samples.append(timed(function, device))
    for result in results.values():
        result.seconds = statistics.median(result.samples) if result.samples else float("nan")
    return results


def in_words(error: BaseException) -> str:
    """An error in one short line, fit for a cell of a table."""
    lines = str(error).replace("|", "/").split("\n")
    return f"{type(error).__name__}: {lines[0][:80]}"


def quiet() -> None:
    """The hosts' warnings are not the benchmarks' subject."""
    warnings.simplefilter("ignore")
    for name in ("transformers", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(function: Callable[[], object], device: torch.device) -> float:
    """MiB above the level before the call: of the device, or of the process (Linux: high-water mark of the pages)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    function()  # what is allocated once and for all
    gc.collect()
    with suppress(OSError, AttributeError):  # or freed pages that the C library keeps would hide what comes
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 1024
    return float("nan")


def machine(device: torch.device) -> str:
    """Hardware and versions, for the head of a table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    parts = [name, f"{torch.get_num_threads()} thread(s)", f"Python {platform.python_version()}"]
    parts += [
        f"{library} {found}" for library, found in versions("torch", "transformers", "peft", "trl", "liger_kernel")
    ]
    return ", ".join(parts)


def versions(*libraries: str) -> Iterator[tuple[str, str]]:
    """Names and versions of those that are installed."""
    for library in libraries:
        with suppress(PackageNotFoundError):
            yield library, version(library)


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(['---'] * len(header))}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def plot_bars(path: Path, title: str, groups: dict[str, dict[str, float]], label: str) -> bool:
    """A grouped bar chart as PNG; False where matplotlib is not installed (pip install '.[plots]')."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        places = [group + index * width for group in range(len(groups))]
        axes.bar(places, [values.get(name, float("nan")) for values in groups.values()], width, label=name)
    axes.set_xticks([group + 0.4 - width / 2 for group in range(len(groups))], list(groups))
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel(label)
    axes.set_title(title)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
