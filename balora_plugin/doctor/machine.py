"""What this machine can do: device, precision, attention kernels, compiling, quantisation. No network, no model."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

from .versions import ABSENT, OLD, installed, standing

BITSANDBYTES = ("cpu", "cuda", "xpu", "hpu", "npu", "mps")
COMPILERS = {"Darwin": "clang++", "Windows": "cl"}  # what inductor takes on a CPU without $CXX; g++ elsewhere


@dataclass
class Machine:
    """The facts that decide whether a config can run here; `look` finds them.

    `device` is a torch device type ("cpu" without an accelerator), `capability` CUDA's (major, minor); `modules` are
    the importable ones among those that settings need; `backends` names torch.compile's, `compiler` its C++ compiler.
    """

    device: str = "cpu"
    name: str = ""
    memory_gib: float = 0.0
    capability: tuple[int, int] | None = None
    count: int = 0
    bf16: bool = False
    versions: Mapping[str, str | None] = field(default_factory=dict)
    modules: frozenset[str] = frozenset()
    sdpa: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    compiler: str | None = None
    bitsandbytes: str | None = None

    def has(self, package: str) -> bool:
        """Returns whether a distribution is installed."""
        return self.versions.get(package) is not None


MODULES = ("kernels", "xformers", "sageattention", "triton")


def look() -> Machine:
    """Returns what this machine is, asked through public functions of torch alone."""
    import torch

    from ..pretrained.attention import FLASH, accelerator, importable

    found = Machine(versions=installed(), device=accelerator() or "cpu", name=platform.machine() or "cpu")
    if found.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found.name, found.memory_gib = properties.name, properties.total_memory / 2**30
        found.capability = (properties.major, properties.minor)
        found.count, found.bf16 = torch.cuda.device_count(), torch.cuda.is_bf16_supported(including_emulation=False)
    elif found.device != "cpu":
        found.count, found.bf16 = torch.accelerator.device_count(), found.device in ("xpu", "npu")
    found.modules = frozenset(
        name for name in (*MODULES, *(package.module for package in FLASH.values())) if importable(name)
    )
    found.sdpa = _sdpa_backends(found)
    found.backends = tuple(torch._dynamo.list_backends(exclude_tags=()))
    found.compiler = _compiler(found)
    found.bitsandbytes = unusable_bitsandbytes(found)
    return found


def _sdpa_backends(machine: Machine) -> tuple[str, ...]:
    """Returns the kernels behind torch's scaled_dot_product_attention, which takes the first that fits an input."""
    import torch

    if machine.device != "cuda":
        return ("flash", "math") if machine.device == "cpu" else ("math",)
    switches = torch.backends.cuda
    major = (machine.capability or (0, 0))[0]
    return tuple(
        name
        for name, on in (
            ("cudnn", switches.cudnn_sdp_enabled() and major >= 8),
            ("flash", switches.flash_sdp_enabled() and switches.is_flash_attention_available() and major >= 8),
            ("mem_efficient", switches.mem_efficient_sdp_enabled()),
            ("math", switches.math_sdp_enabled()),
        )
        if on
    )


def _compiler(machine: Machine) -> str | None:
    """Returns what inductor compiles with: Triton (and a C compiler for its launchers) on a GPU, C++ on a CPU."""
    if machine.device == "cpu":
        return shutil.which(os.environ.get("CXX") or COMPILERS.get(platform.system(), "g++"))
    chosen = os.environ.get("CC")
    c = next((path for name in ((chosen,) if chosen else ("gcc", "clang", "cc")) if (path := shutil.which(name))), None)
    return f"triton with {c}" if "triton" in machine.modules and c else None


def unusable_bitsandbytes(machine: Machine) -> str | None:
    """Returns why bitsandbytes cannot be used, None if it can.

    It is not imported for that: it may ask the hub for a kernel.
    """
    standing_here = standing("bitsandbytes", machine.versions.get("bitsandbytes"))
    if standing_here in (ABSENT, OLD):
        return f"is {standing_here}"
    return None if machine.device in BITSANDBYTES else f"has no kernels for {machine.device}"
