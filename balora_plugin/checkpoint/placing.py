"""An adapter in a directory that had one before: the old one or the new one whole, or none that anybody would read.

What is read of an adapter begins with its adapter_config.json (PEFT) and its ba_lora.json (this package). Both go first
and come back last, so that a process that is killed in between leaves an adapter that cannot be loaded, not a mixture.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..atomic import remove_abandoned, replacing
from .location import AdapterFiles
from .names import CONFIG_FILE, HEAD_FILE, INIT_FILE, PROBE_FILE, SETTINGS_FILE
from .settings import read_settings

_BESIDE = (INIT_FILE, HEAD_FILE, PROBE_FILE)  # what only some adapters have


def withdraw(directory: str | os.PathLike[str]) -> None:
    """Makes an adapter in `directory` one that nobody loads, before another is written over it."""
    for name in (SETTINGS_FILE, CONFIG_FILE):
        Path(directory, name).unlink(missing_ok=True)


def retire(directory: str | os.PathLike[str]) -> None:
    """Removes the settings and side files of a BA-LoRA adapter, which would lie beside another kind of model."""
    if Path(directory, SETTINGS_FILE).is_file():
        withdraw(directory)
        for name in _BESIDE:
            Path(directory, name).unlink(missing_ok=True)


def place(source: str | os.PathLike[str], target: str | os.PathLike[str], adapters: Sequence[str]) -> None:
    """Copies the saved adapters of these names from `source` to `target`, in whose place nothing of an older one stays.

    A0, which is written once and never into, is a hard link where the file system has them.

    Raises:
        ValueError: an adapter's ba_lora.json is damaged.
        OSError: a file that it names cannot be copied.
    """
    for name in adapters:
        inner = "" if name == "default" else name
        _place_one(Path(source, inner), Path(target, inner))


def _place_one(source: Path, target: Path) -> None:
    settings = read_settings(AdapterFiles(str(source)))
    os.makedirs(target, exist_ok=True)
    withdraw(target)
    named = () if settings is None else [name for name in settings["sha256"] if name != CONFIG_FILE]
    for name in _BESIDE:
        if name not in named:
            (target / name).unlink(missing_ok=True)
    if settings is None:  # of a save that an engine keeps in files of its own
        return
    for name in (*named, CONFIG_FILE, SETTINGS_FILE):
        _copy(source / name, target / name)


def _copy(source: Path, target: Path) -> None:
    remove_abandoned(target, age=0.0)  # this run alone writes here, and what is left over would be pushed
    with replacing(target) as temporary:
        if source.name == INIT_FILE:
            with suppress(OSError):  # another file system, or one without links
                os.link(source, temporary)
                return
        shutil.copyfile(source, temporary)
