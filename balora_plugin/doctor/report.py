"""The facts of a machine as lines for people: what is there, what was tested together, what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..findings import Finding
from ..pretrained.attention import FLASH, attention_of, flash_lacks
from . import versions
from .gpus import Gpu, with_gpu
from .machine import Machine
from .memory import Memory
from .requested import problems
from .versions import ABSENT, BOUNDS, NEWER, OLD

HERE = "here"
OK, NOTE, PROBLEM = "", "note", "PROBLEM"


@dataclass
class Line:
    """One fact; `remedy` is the command that mends or brings it, empty where there is nothing to do."""

    subject: str
    text: str
    state: str = OK
    remedy: str = ""


@dataclass
class Report:
    """Everything `balora doctor` says.

    Attributes:
        lines: The facts.
        config: The file that was asked about, None without one.
        found: What of it cannot run, by the machine that was judged: "here", or the names of GPUs.
        memory: What it takes on the GPUs that were named.
    """

    lines: list[Line]
    config: str | None = None
    found: dict[str, list[Finding]] = field(default_factory=dict)
    memory: Memory | None = None

    @property
    def problems(self) -> list[Finding]:
        """Returns what cannot run on one of the machines, each once."""
        return list({str(problem): problem for found in self.found.values() for problem in found}.values())

    @property
    def usable(self) -> bool:
        """Returns whether the command's exit code is 0: of several GPUs one is enough."""
        fits = {} if self.memory is None else {fit.name: fit.fits for fit in self.memory.fits}
        uncounted = self.memory is not None and not fits
        runs = not self.found or any(not found and fits.get(name, True) for name, found in self.found.items())
        return runs and not uncounted and all(line.state != PROBLEM for line in self.lines)

    def as_json(self) -> dict[str, Any]:
        """Returns what --json prints."""
        return {
            "usable": self.usable,
            "lines": [asdict(line) for line in self.lines],
            "config": self.config,
            "problems": [problem._asdict() for problem in self.problems],
            "judged": {name: [problem._asdict() for problem in found] for name, found in self.found.items()},
            "memory": None if self.memory is None else asdict(self.memory),
        }


def about(
    machine: Machine,
    values: dict[str, Any] | None = None,
    config: str | None = None,
    gpus: Sequence[Gpu] = (),
) -> Report:
    """Returns the report on a machine, or on it with each of `gpus` in the place of what is there.

    With what of a YAML's `values` (from the file `config`) cannot run on it.
    """
    judged = {gpu.name: with_gpu(machine, gpu) for gpu in gpus} or {HERE: machine}
    lines = list(_versions(machine))
    for each in judged.values():
        lines += [*_device(each), *_attention(each, values or {}), *_compile(each), _bits(each)]
    unique = list({(line.subject, line.text): line for line in lines}.values())
    found = {} if values is None else {name: problems(values, each) for name, each in judged.items()}
    return Report(unique, config, found)


def _versions(machine: Machine) -> Iterator[Line]:
    for name in versions.NAMES:
        version = machine.versions.get(name)
        standing = versions.standing(name, version)
        bounds = BOUNDS.get(name)
        if standing == ABSENT and (host := versions.apart(name, machine.versions)):
            yield Line(name, f"{ABSENT}; in an environment of its own, not beside {host}")
        elif standing == ABSENT:
            needed = bounds is not None and bounds.needed
            yield Line(name, ABSENT, PROBLEM if needed else OK, versions.remedy(name))
        elif standing == OLD and (host := versions.asked_by_a_host(name, machine.versions)):
            assert bounds is not None
            yield Line(name, f"{version}  for {host}; used without it, needs {bounds.least} or newer")
        elif standing == OLD:
            assert bounds is not None
            yield Line(name, f"{version}  {OLD}: needs {bounds.least} or newer", PROBLEM, versions.remedy(name))
        elif standing == NEWER:
            assert bounds is not None
            yield Line(name, f"{version}  {NEWER} ({_span(bounds)})", NOTE, versions.remedy(name))
        else:
            tested = "" if bounds is None or standing == versions.TESTED else f" (tested: {_span(bounds)})"
            yield Line(name, f"{version}  {standing}{tested}")
        if version is not None and name in versions.UNTESTED:
            yield Line(name, f"not tried with it: {versions.UNTESTED[name]}")
    found = versions.conflicts(machine.versions)
    for conflict in found:
        yield Line(
            "together",
            f"{conflict.name} {conflict.version} asks for {conflict.requirement}, found {conflict.found}",
            PROBLEM,
            f'pip install "{conflict.requirement}"',
        )
    if not found:
        sets = (", ".join(f"{name} {release}" for name, release in each.items()) for each in versions.TOGETHER)
        yield Line("together", "; or ".join(sets))


def _span(bounds: versions.Bounds) -> str:
    return bounds.last if bounds.first == bounds.last else f"{bounds.first} to {bounds.last}"


def _device(machine: Machine) -> Iterator[Line]:
    if machine.device == "cpu":
        yield Line("device", f"CPU ({machine.name}), no GPU: small models and tests")
        return
    capability = "" if machine.capability is None else ", compute capability {}.{}".format(*machine.capability)
    memory = f", {machine.memory_gib:.0f} GiB" if machine.memory_gib else ""
    several = f"{machine.count} x " if machine.count > 1 else ""
    bf16 = "bf16" if machine.bf16 else "no bf16: write bf16: false, fp16: true"
    yield Line("device", f"{several}{machine.name}{memory}{capability}, {bf16}", OK if machine.bf16 else NOTE)


def _attention(machine: Machine, values: dict[str, Any]) -> Iterator[Line]:
    """Says which kernel will be used, and what the flash implementations lack."""
    key, value, name = attention_of(values)
    kernels = f" ({', '.join(machine.sdpa)})" if name == "sdpa" else ""
    why = f"by {key}: {str(value).lower() if isinstance(value, bool) else value}" if key else "the default"
    yield Line("attention", f"{name}{kernels}, {why}")
    device = None if machine.device == "cpu" else machine.device
    for flash in FLASH:
        lacks = flash_lacks(flash, device, machine.capability, machine.modules.__contains__)
        if lacks is not None:
            yield Line(flash, lacks[0], OK, lacks[1])
        elif machine.device == "cuda" and FLASH[flash].module not in machine.modules:
            yield Line(flash, "from the hub at its first use, by the package kernels")
        else:
            yield Line(flash, "usable, in half precision")


def _compile(machine: Machine) -> Iterator[Line]:
    if "ba_lora" in machine.backends:
        where = ", but not in ms-swift" if machine.versions.get("ms-swift") else ""
        yield Line("compile", f"torch.compile knows the backend ba_lora; ba_lora: {{compile: true}} turns it on{where}")
    else:
        text = "the backend ba_lora is not registered: compile: true works, torch.compile(backend=...) does not"
        yield Line("compile", text, NOTE, "pip install . in a clone of balora-plugin")
    if machine.compiler is None:
        what = "a C++ compiler" if machine.device == "cpu" else "triton or a C compiler"
        bring = "apt install g++" if machine.device == "cpu" else "pip install triton, apt install gcc"
        yield Line("compiler", f"{what} is missing: compile: true would run eagerly", NOTE, bring)
    else:
        yield Line("compiler", machine.compiler)


def _bits(machine: Machine) -> Line:
    if machine.bitsandbytes is None:
        return Line("4-bit, 8-bit", f"bitsandbytes {machine.versions.get('bitsandbytes')} on {machine.device}")
    return Line("4-bit, 8-bit", f"bitsandbytes {machine.bitsandbytes}", NOTE, versions.remedy("bitsandbytes"))
