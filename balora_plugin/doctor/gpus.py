"""GPUs by name: what they report of themselves, and this machine with one of them in it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from .machine import Machine, unusable_bitsandbytes


class Gpu(NamedTuple):
    """A GPU. `mib`: its memory as nvidia-smi and torch report it, which is not what the name says: 48 GB with error
    correction are 45 GiB. `capability`: CUDA's, (major, minor)."""

    name: str
    mib: int
    capability: tuple[int, int]


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", 15360, (7, 5)),
        Gpu("v100-16", 16160, (7, 0)),
        Gpu("v100-32", 32510, (7, 0)),
        Gpu("rtx3090", 24576, (8, 6)),
        Gpu("rtx4090", 24564, (8, 9)),
        Gpu("a10", 23028, (8, 6)),
        Gpu("l4", 23034, (8, 9)),
        Gpu("a40", 46068, (8, 6)),
        Gpu("l40s", 46068, (8, 9)),
        Gpu("a100-40", 40960, (8, 0)),
        Gpu("a100-80", 81920, (8, 0)),
        Gpu("h100", 81559, (9, 0)),
        Gpu("h200", 143771, (9, 0)),
    )
}
SHORT = {"a100": "a100-80", "v100": "v100-32", "h100-80": "h100"}
_BF16 = (8, 0)  # and newer ones compute it


def gpu_named(name: str) -> Gpu:
    """Returns a GPU of GPUS.

    Raises:
        ValueError: no such name; lists those there are.
    """
    known = name.strip().lower().replace("_", "-")
    known = SHORT.get(known, known)
    if known not in GPUS:
        raise ValueError(f"--gpu {name} is not known: write one of {', '.join(sorted({*GPUS, *SHORT}))}.")
    return GPUS[known]


def with_gpu(machine: Machine, gpu: Gpu) -> Machine:
    """Returns `machine` with one such GPU: the same packages, and what torch brings with CUDA (Triton, its kernels)."""
    bf16 = gpu.capability >= _BF16
    there = dataclasses.replace(
        machine,
        device="cuda",
        name=gpu.name,
        memory_gib=gpu.mib / 2**10,
        capability=gpu.capability,
        count=1,
        bf16=bf16,
        modules=machine.modules | {"triton"},
        sdpa=(*(("cudnn", "flash") if bf16 else ()), "mem_efficient", "math"),
        compiler=machine.compiler if machine.device == "cuda" else "triton, with a C compiler",
    )
    return dataclasses.replace(there, bitsandbytes=unusable_bitsandbytes(there))
