"""Whether an adapter or checkpoint directory is whole: what a crash cut short is refused, the last whole one named."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .location import AdapterFiles
from .names import CONFIG_FILE, HEAD_FILE, INIT_FILE, SETTINGS_FILE, STATE_FILE, WEIGHTS_FILE
from .settings import changed_files, read_settings

_ARCHIVES = ("optimizer.pt", "scheduler.pt", "scaler.pt")  # zip files: their directory stands at their end
_DEFAULT = ("default",)  # PEFT saves an adapter of this name in the directory itself, others below it
_SHARDED = ("pytorch_model_fsdp*", "optimizer_*", "optimizer.bin", "global_step*", "zero_to_fp32.py")


def adapter_flaw(settings: dict[str, Any] | None, files: AdapterFiles) -> str | None:
    """Returns what is wrong with an adapter whose ba_lora.json holds `settings`; None if the files are those named."""
    if settings is None:
        return f"{SETTINGS_FILE}, which is written last, is missing"
    if WEIGHTS_FILE not in settings["sha256"]:
        return f"{SETTINGS_FILE} was written before any weights were"
    for name, what in changed_files(settings, files).items():
        needed = name in (WEIGHTS_FILE, INIT_FILE, HEAD_FILE)  # not the probe, which may be left out
        if needed or (name == CONFIG_FILE and what == "is missing"):  # it may name a base that has moved
            return f"{name} {what}"
    return None


def is_finished(directory: str) -> bool:
    """Returns whether `directory` holds an adapter of ours whose files are those it names."""
    files = AdapterFiles(directory)
    try:
        settings = read_settings(files) if os.path.isdir(directory) else None
    except ValueError:
        return False
    return settings is not None and adapter_flaw(settings, files) is None


def check_adapter(settings: dict[str, Any], files: AdapterFiles) -> None:
    """Refuses files that are not the ones this ba_lora.json was written for (a crash, a mixed-up copy).

    Raises:
        ValueError: names the file and, for a checkpoint, the last whole one beside it.
    """
    flaw = adapter_flaw(settings, files)
    if flaw is not None:
        raise ValueError(
            f"{files}: {flaw}: the save was cut short, or files of two runs were mixed. {_remedy(files.model_id)} "
            "(For inference alone: peft.PeftModel.)"
        )


def begin_save(directory: str, *, rank: int = 0, processes: int = 1, first: bool = True) -> None:
    """Makes an earlier checkpoint in `directory` one that is not whole, before a new one is written over it.

    Else a save that a crash cuts short would leave this run's adapter beside that run's optimizer, and count as whole.
    Every rank calls it and removes its own random state; `first`, the one that saves, what is written once.
    """
    if re.fullmatch(r"checkpoint-\d+", Path(os.path.abspath(directory)).name):
        once = (STATE_FILE, *_ARCHIVES) if first else ()  # save_only_model would leave another run's optimizer
        for name in (*once, *_random_states([rank] if processes > 1 else [])):
            Path(directory, name).unlink(missing_ok=True)


def _random_states(ranks: Sequence[int]) -> list[str]:
    """Returns a Trainer's files of random states; of no ranks: those of a single process."""
    return [f"rng_state_{rank}.pth" for rank in ranks] or ["rng_state.pth"]


def checkpoint_flaw(directory: str, adapters: Sequence[str] = _DEFAULT) -> str | None:
    """Returns what is wrong with a checkpoint of a BA-LoRA trainer; None if training can be resumed from it exactly.

    A Trainer writes the adapter (ba_lora.json last of it), the optimizer and scheduler, and last trainer_state.json.
    `adapters`: the names of the model's BA-LoRA adapters, each of which has to be whole where PEFT saves it.
    """
    path = Path(directory)
    if not path.is_dir():
        return "there is no such directory"
    sharded = any(next(path.glob(pattern), None) is not None for pattern in _SHARDED)
    flaw = _trainers_flaw(path, sharded=sharded)
    for name in adapters:
        flaw = flaw or _saved_flaw(directory, name, sharded=sharded)
    return flaw


def _trainers_flaw(path: Path, *, sharded: bool) -> str | None:
    """Returns what is wrong with a Trainer's own files in a checkpoint: its state, optimizer and scheduler."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE_FILE}, which is written last, is missing"
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        return f"{STATE_FILE} is cut short"
    for name in _ARCHIVES:
        archive = path / name
        if archive.exists() and not zipfile.is_zipfile(archive):
            return f"{name} is cut short"
        if not archive.exists() and name == "optimizer.pt" and not sharded:
            return f"{name} is missing (save_only_model=True leaves it out), so the optimizer would start anew"
    return None


def _saved_flaw(directory: str, name: str, *, sharded: bool) -> str | None:
    """Returns what is wrong with one adapter of a checkpoint, the random states of its ranks included."""
    where = directory if name == "default" else os.path.join(directory, name)
    try:
        settings = read_settings(AdapterFiles(where))
    except ValueError as error:
        return str(error)
    if settings is None and sharded:  # its tensors stand in the engine's own files
        return None
    for file in _random_states(settings["ranks"]) if settings is not None and "ranks" in settings else ():
        path = Path(directory, file)
        if not zipfile.is_zipfile(path):  # ranks write theirs when they get to it
            return f"{file} is {'cut short' if path.exists() else 'missing'}"
    flaw = adapter_flaw(settings, AdapterFiles(where))
    return flaw if flaw is None or name == "default" else f"adapter {name!r}: {flaw}"


def check_whole(directory: str, adapters: Sequence[str] = _DEFAULT) -> None:
    """Refuses to resume from a checkpoint that is not whole; `adapters` as for [`checkpoint_flaw`].

    Raises:
        ValueError: names what is missing and the last whole checkpoint beside it.
    """
    flaw = checkpoint_flaw(directory, adapters)
    if flaw is not None:
        raise ValueError(f"cannot resume from {directory}: {flaw}. {_remedy(directory, adapters)}")


def last_whole(directory: str, adapters: Sequence[str] = _DEFAULT, *, but: str | None = None) -> str | None:
    """Returns the newest whole `checkpoint-N` in `directory` but `but`; `adapters` as for [`checkpoint_flaw`]."""
    found = []
    for entry in os.scandir(directory) if os.path.isdir(directory) else ():
        match = re.fullmatch(r"checkpoint-(\d+)", entry.name)
        if match and entry.is_dir() and entry.name != but:
            found.append((int(match[1]), entry.path))
    return next((path for _, path in sorted(found, reverse=True) if checkpoint_flaw(path, adapters) is None), None)


def _remedy(directory: str, adapters: Sequence[str] = _DEFAULT) -> str:
    path = Path(os.path.abspath(directory))
    if re.fullmatch(r"checkpoint-\d+", path.parent.name):  # the directory of an adapter of another name
        path, adapters = path.parent, (path.name,)
    if not re.fullmatch(r"checkpoint-\d+", path.name):
        return "Use the last whole checkpoint of that run."
    whole = last_whole(str(path.parent), adapters, but=path.name)
    if whole is None:
        return f"There is no whole checkpoint in {path.parent}: start again without resuming."
    automatically = f" (to do so automatically, remove {path})" if path.exists() else ""
    return f"The last whole checkpoint is {whole}: resume from it{automatically}."
