"""Versions: what is installed, what was tested, what packages ask of one another. Imports none of them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version


class Bounds(NamedTuple):
    """Least version that works, first and last release tested: those of pyproject.toml and requirements/ (a test)."""

    least: str
    first: str
    last: str
    needed: bool = False


BOUNDS = {
    "python": Bounds("3.10", "3.11", "3.11", needed=True),
    "torch": Bounds("2.10", "2.10", "2.13", needed=True),
    "transformers": Bounds("5.6", "5.6", "5.24", needed=True),
    "peft": Bounds("0.18", "0.18", "0.21", needed=True),
    "trl": Bounds("1.9", "1.9", "1.16"),
    "axolotl": Bounds("0.19", "0.19", "0.19"),
    "llamafactory": Bounds("0.9.5", "0.9.5", "0.9.5"),
    "ms-swift": Bounds("4.6", "4.6", "4.6"),
    "accelerate": Bounds("1.11", "1.11", "1.15"),
    "bitsandbytes": Bounds("0.50", "0.50", "0.50"),
}
TOGETHER: tuple[dict[str, str], ...] = (  # what the sets of requirements/ install, the host first
    {"axolotl": "0.19", "trl": "1.9", "peft": "0.20", "transformers": "5.16"},
    {"trl": "1.16", "peft": "0.21", "transformers": "5.24"},
    {"llamafactory": "0.9.5", "trl": "0.24", "peft": "0.18", "transformers": "5.6"},
    {"ms-swift": "4.6", "trl": "0.29", "peft": "0.20", "transformers": "5.19"},
)
UNTESTED = {  # of hosts with an environment of their own, what nobody has tried
    "llamafactory": "GPUs, DeepSpeed, FSDP, images, predict_with_generate, use_unsloth_gc (docs/llamafactory.md)",
    "ms-swift": "GPUs, DeepSpeed, FSDP, device_map over several GPUs, images, use_liger_kernel (docs/swift.md)",
}
OTHERS = ("deepspeed", "flash-attn")  # optional, and no release of theirs is pinned
NAMES = (*BOUNDS, *OTHERS)

TESTED, SUPPORTED, NEWER, OLD, ABSENT = "tested", "supported", "newer than tested", "too old", "not installed"


def installed() -> dict[str, str | None]:
    """Returns the version of every package this command speaks of, None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in NAMES[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def standing(name: str, version: str | None) -> str:
    """Returns how a version stands to those that were tested.

    TESTED, SUPPORTED (between the least and the first tested, or nothing is pinned), NEWER, OLD or ABSENT.
    """
    if version is None:
        return ABSENT
    bounds = BOUNDS.get(name)
    if bounds is None:
        return SUPPORTED
    least, first, last = (Version(text).release for text in bounds[:3])
    try:
        here = Version(version).release[: len(last)]
    except InvalidVersion:  # a checkout
        return SUPPORTED
    if here < least:
        return OLD
    if here > last:
        return NEWER
    return TESTED if here >= first else SUPPORTED


def asked_by_a_host(name: str, versions: Mapping[str, str | None]) -> str | None:
    """Returns the installed host that was tested with an older release of `name` than is needed elsewhere, or None.

    Only TRL has such: LLaMA-Factory and ms-swift bring one that BaLoraSFTTrainer cannot use, and need none here.
    """
    for together in TOGETHER:
        host = next(iter(together))
        tested = together.get(name)
        if host != name and tested is not None and versions.get(host) and standing(name, tested) == OLD:
            return host
    return None


def apart(name: str, versions: Mapping[str, str | None]) -> str | None:
    """Returns the installed host that a missing one, `name`, would take the versions from, or None."""
    hosts = [host for host in (next(iter(together)) for together in TOGETHER) if host != "trl"]
    if name not in hosts:
        return None
    return next((host for host in hosts if versions.get(host)), None)


def remedy(name: str) -> str:
    """Returns the command that brings a version that was tested."""
    if name == "flash-attn":
        return "pip install flash-attn --no-build-isolation"
    bounds = BOUNDS.get(name)
    if bounds is None:
        return f"pip install {name}"
    if name == "python":
        return f"make an environment with python {bounds.last}"
    if bounds.first == bounds.last:
        return f'pip install "{name}=={bounds.last}.*"'
    major, minor = Version(bounds.last).release
    return f'pip install "{name}>={bounds.first},<{major}.{minor + 1}"'


class Conflict(NamedTuple):
    """`name` `version` asks for `requirement`, and `found` is installed."""

    name: str
    version: str
    requirement: str
    found: str


def conflicts(versions: Mapping[str, str | None], required: Mapping[str, list[str]] | None = None) -> list[Conflict]:
    """Returns what installed packages ask of one another and do not get.

    Args:
        versions: As from `installed`.
        required: Requirement lines by package; None: as their own metadata says.
    """
    found = []
    for name, version in versions.items():
        if version is None or name == "python":
            continue
        for line in _requires(name) if required is None else required.get(name, []):
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            here = versions.get(requirement.name.lower())
            if here is None or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
                continue
            if not requirement.specifier.contains(here, prereleases=True):
                wanted = f"{requirement.name}{requirement.specifier}"
                found.append(Conflict(name, version, wanted, here))
    return found


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
