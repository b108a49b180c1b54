"""Whether a YAML's training step fits named GPUs, and what would make it fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..memory.estimate import GIB, gib
from .gpus import Gpu

RESERVE = 1.5 * GIB  # CUDA's context and libraries' work space, beside what the allocator is asked for
LOSS = 0.04  # of the rest, to the allocator's rounding and gaps


@dataclass(frozen=True)
class Fit:
    """Whether a step fits one GPU: its `name`, the bytes that tensors can have there, and those that the step takes."""

    name: str
    room: int
    needs: int

    @property
    def fits(self) -> bool:
        """Returns whether there is room."""
        return self.needs <= self.room

    def __str__(self) -> str:
        left = gib(abs(self.room - self.needs))
        said = f"fits, {left} GiB to spare" if self.fits else f"does not fit, {left} GiB too much"
        return f"{self.name}: {said} (room for {gib(self.room)} GiB of tensors)"


@dataclass(frozen=True)
class Memory:
    """What is said of a YAML's memory.

    Attributes:
        estimate: The step's bytes by part, as JSON has them; None where they could not be counted.
        fits: One a GPU.
        lines: For people: the parts, each GPU, and what would save memory where one is too small.
    """

    estimate: dict[str, Any] | None
    fits: tuple[Fit, ...]
    lines: tuple[str, ...]


def room_on(gpu: Gpu) -> int:
    """Returns the bytes that tensors can have on a GPU."""
    return int((gpu.mib * 2**20 - RESERVE) * (1 - LOSS))


def memory_on(values: dict[str, Any], gpus: Sequence[Gpu], *, axolotl: bool) -> Memory:
    """Returns what a YAML's training step takes, and whether it fits.

    Args:
        values: The YAML as it was written.
        gpus: Those to fit it on.
        axolotl: Whether Axolotl is here, whose keys the YAML has.
    """
    if "base_model" not in values or not axolotl:
        why = "Axolotl is not installed" if "base_model" in values else "the file names no base_model"
        return _uncounted(why)
    from ..hosts.axolotl.workload import case_of
    from ..memory.remedies import advice

    try:
        case = case_of(values)
        found = case.estimate()
    except Exception as error:  # models of any kind come here, and some cannot run on shapes alone
        return _uncounted(str(error).strip().partition("\n")[0] or type(error).__name__)
    fits = tuple(Fit(gpu.name, room_on(gpu), found.total) for gpu in gpus)
    lines = [f"a step of {case.work.rows} x {case.work.length} tokens takes {found.in_words()}", *map(str, fits)]
    if not all(fit.fits for fit in fits):
        lines += advice(case, found)
    if values.get("fsdp") or values.get("fsdp_config") or values.get("deepspeed"):
        lines.append("counted on one GPU: what the engine splits over several is less on each")
    return Memory(found.as_json(), fits, tuple(lines))


def _uncounted(why: str) -> Memory:
    return Memory(None, (), (f"not counted: {why}",))
