"""Whether an adapter or checkpoint directory is whole: what a crash cut short is refused, the last whole one named."""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .location import AdapterFiles
from .manifest import LARGEST, Manifest, manifest_flaw, open_manifest, random_states, read_manifest
from .names import (
    CONFIG_FILE,
    HEAD_FILE,
    INIT_FILE,
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    SCALER_FILE,
    SCHEDULER_FILE,
    SETTINGS_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
)
from .settings import changed_files, read_settings
from .weights import largest_saved

_ARCHIVES = (OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE)  # zip files: their directory stands at their end
_STARTS_ANEW = {OPTIMIZER_FILE: "the optimizer", SCHEDULER_FILE: "the learning rate's schedule"}
_ANEW = " Start again without resuming."
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
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


def is_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Returns whether a directory has the name that a Trainer gives its checkpoints."""
    return _CHECKPOINT.fullmatch(Path(os.path.abspath(directory)).name) is not None


def begin_save(directory: str, *, rank: int = 0, processes: int = 1, first: bool = True, sealed: bool = False) -> None:
    """Makes an earlier checkpoint in `directory` one that is not whole, before a new one is written over it.

    Else a save that a crash cuts short would leave this run's adapter beside that run's optimizer, and count as whole.
    Every rank calls it and removes its own random state; `first`, the one that saves, what is written once. `sealed`:
    a manifest will be written last, so that there is an open one until then.
    """
    if not is_checkpoint(directory):
        return
    once = (STATE_FILE, MANIFEST_FILE, *_ARCHIVES) if first else ()  # save_only_model would leave another's optimizer
    for name in (*once, *random_states([rank] if processes > 1 else [])):
        Path(directory, name).unlink(missing_ok=True)
    if first and sealed:
        open_manifest(directory)


def checkpoint_flaw(directory: str, adapters: Sequence[str] = _DEFAULT, *, fresh_optimizer: bool = False) -> str | None:
    """Returns what is wrong with a checkpoint of a BA-LoRA trainer; None if training can be resumed from it exactly.

    A Trainer writes the adapter (ba_lora.json last of it), the optimizer and scheduler, and last trainer_state.json.
    `adapters`: the names of the model's BA-LoRA adapters, each of which has to be whole where PEFT saves it.
    `fresh_optimizer`: for a run that does without optimizer, schedule and random states, which may be missing.
    """
    path = Path(directory)
    if not path.is_dir():
        return "there is no such directory"
    sharded = any(next(path.glob(pattern), None) is not None for pattern in _SHARDED)
    try:
        manifest = read_manifest(directory)
    except ValueError as error:
        return str(error)
    asked = {"sharded": sharded, "fresh_optimizer": fresh_optimizer}
    flaw = _trainers_flaw(path, manifest, **asked)
    for name in adapters:
        flaw = flaw or _saved_flaw(directory, name, **asked)
    if manifest is not None:
        flaw = flaw or manifest_flaw(directory, manifest, adapters, **asked)
    return flaw


def unchecked(directory: str) -> str | None:
    """Returns what could not be checked of a whole checkpoint, in words; None if nothing."""
    if read_manifest(directory) is not None:
        return None
    return (
        f"{directory} has no {MANIFEST_FILE} (an earlier release wrote it): whether optimizer, scheduler, random "
        f"states and {STATE_FILE} are those that were saved with its weights could not be checked."
    )


def _trainers_flaw(path: Path, manifest: Manifest | None, *, sharded: bool, fresh_optimizer: bool) -> str | None:
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
        if not (path / name).exists():
            if name in _STARTS_ANEW and not sharded and not fresh_optimizer:
                cause = " (save_only_model=True leaves it out)" if manifest is None or manifest.save_only_model else ""
                return f"{name} is missing{cause}, so {_STARTS_ANEW[name]} would start anew"
        elif flaw := _archive_flaw(path / name, thorough=manifest is None):
            return flaw
    others = sorted(path.glob("rng_state*.pth")) if manifest is None else ()  # a manifest has their hashes
    return next((flaw for file in others if (flaw := _archive_flaw(file, thorough=True))), None)


def _archive_flaw(path: Path, *, thorough: bool) -> str | None:
    """Returns what is wrong with a file of torch.save, a zip file; `thorough`: its records have their checksums too."""
    if not zipfile.is_zipfile(path):
        return f"{path.name} is cut short"
    if not thorough:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError):
        bad = "all of it"
    return None if bad is None else f"{path.name} is damaged ({bad})"


def _saved_flaw(directory: str, name: str, *, sharded: bool, fresh_optimizer: bool) -> str | None:
    """Returns what is wrong with one adapter of a checkpoint, the random states of its ranks included."""
    where = directory if name == "default" else os.path.join(directory, name)
    try:
        settings = read_settings(AdapterFiles(where))
    except ValueError as error:
        return str(error)
    if settings is None and sharded:  # its tensors stand in the engine's own files
        return None
    for file in random_states(settings["ranks"]) if settings is not None and "ranks" in settings else ():
        path = Path(directory, file)
        if fresh_optimizer and not path.exists():
            continue
        if not zipfile.is_zipfile(path):  # ranks write theirs when they get to it
            return f"{file} is {'cut short' if path.exists() else 'missing'}"
    flaw = adapter_flaw(settings, AdapterFiles(where))
    return flaw if flaw is None or name == "default" else f"adapter {name!r}: {flaw}"


def check_whole(directory: str, adapters: Sequence[str] = _DEFAULT, *, fresh_optimizer: bool = False) -> None:
    """Refuses to resume from a checkpoint that is not whole; `adapters` and the rest as for [`checkpoint_flaw`].

    Raises:
        ValueError: names what is missing, and the last whole checkpoint beside it or how to go on without.
    """
    flaw = checkpoint_flaw(directory, adapters, fresh_optimizer=fresh_optimizer)
    if flaw is None:
        return
    remedy = _remedy(directory, adapters)
    if not fresh_optimizer and checkpoint_flaw(directory, adapters, fresh_optimizer=True) is None:
        otherwise = remedy.removesuffix(_ANEW) if remedy.endswith(_ANEW) else f"Else: {remedy}"
        remedy = f"{_without_optimizer(directory, adapters)} {otherwise}"
    raise ValueError(f"cannot resume from {directory}: {flaw}. {remedy}")


def _without_optimizer(directory: str, adapters: Sequence[str]) -> str:
    """Returns how to go on from weights whose optimizer was not kept, in the words of each host."""
    load = "load the model from there"
    if adapters:
        load = f"balora_plugin.BaLoraModel.from_pretrained(base, {directory!r}, is_trainable=True)"
    return (
        f"To go on with a fresh optimizer: trainer.train(resume_from_checkpoint={directory!r}, fresh_optimizer=True). "
        f"To begin a new run with its weights, without resuming: {load} (Axolotl: lora_model_dir: {directory})."
    )


@dataclass(frozen=True)
class Recommended:
    """The checkpoint to go on from, None if there is none, and the newer whole ones that were passed over."""

    path: str | None
    passed_over: tuple[str, ...]
    unseen: bool = False  # nothing says how large its weights are, and they could not be read

    def in_words(self) -> str:
        """Returns why checkpoints were passed over, as sentences that follow others; empty if none were."""
        words = [
            f" ({name} is whole, but holds weights beyond {LARGEST:g} (or NaN), as a learning rate far too high gives.)"
            for name in self.passed_over
        ]
        return "".join(words) + (f" (The weights of {self.path} were not checked.)" if self.unseen else "")


def recommended(directory: str, adapters: Sequence[str] = _DEFAULT, *, but: str | None = None) -> Recommended:
    """Finds the newest `checkpoint-N` in `directory`, but `but`, that is whole and whose weights are plausible.

    Weights beyond [`LARGEST`] are not: none that can be used in half precision are. What a manifest says of them is
    asked, and the weights that it was written for are those that the hashes name; without one the files are read.
    """
    passed_over: list[str] = []
    for path in reversed(checkpoints_in(directory).values()):
        if os.path.basename(path) == but or checkpoint_flaw(path, adapters) is not None:
            continue
        manifest = read_manifest(path)
        largest = largest_saved(path, adapters) if manifest is None else manifest.largest
        if largest is None or largest <= LARGEST:  # not NaN
            return Recommended(path, tuple(passed_over), unseen=manifest is None and largest is None)
        passed_over.append(path)
    return Recommended(None, tuple(passed_over))


def last_whole(directory: str, adapters: Sequence[str] = _DEFAULT, *, but: str | None = None) -> str | None:
    """Returns the path of [`recommended`], None where there is none; `adapters` as for [`checkpoint_flaw`]."""
    return recommended(directory, adapters, but=but).path


def checkpoints_in(directory: str | os.PathLike[str]) -> dict[int, str]:
    """Returns {step: path} of every `checkpoint-N` in a directory, whole or not, by step; none without a directory."""
    found: dict[int, str] = {}
    for entry in os.scandir(directory) if os.path.isdir(directory) else ():
        match = _CHECKPOINT.fullmatch(entry.name)
        if match and entry.is_dir():
            found[int(match[1])] = entry.path
    return dict(sorted(found.items()))


def trained_terms(directory: str) -> dict[str, Any] | None:
    """Returns the settings of the terms that a checkpoint was trained with, every one resolved; None: not recorded."""
    manifest = read_manifest(directory)
    if manifest is not None and manifest.terms is not None:
        return manifest.terms
    settings = read_settings(AdapterFiles(directory))  # of an earlier release
    return None if settings is None else settings.get("regularizers_in_force")


def trained_rows(directory: str) -> dict[str, int]:
    """Returns the numbers whose product is how many rows a step of a checkpoint's run took; empty: not recorded."""
    manifest = read_manifest(directory)
    return {} if manifest is None or manifest.rows is None else manifest.rows


def trained_settings(directory: str) -> dict[str, Any]:
    """Returns what else of its host's arguments a checkpoint's run had; empty: not recorded."""
    manifest = read_manifest(directory)
    return {} if manifest is None or manifest.settings is None else manifest.settings


def _remedy(directory: str, adapters: Sequence[str] = _DEFAULT) -> str:
    path = Path(os.path.abspath(directory))
    if is_checkpoint(path.parent):  # the directory of an adapter of another name
        path, adapters = path.parent, (path.name,)
    if not is_checkpoint(path):
        inside = last_whole(str(path), adapters)
        return "Use the last whole checkpoint of that run" + (f": {inside}." if inside else ".")
    found = recommended(str(path.parent), adapters, but=path.name)
    if found.path is None:
        return f"There is no whole checkpoint in {path.parent}.{found.in_words()}{_ANEW}"
    automatically = f" (to do so automatically, remove {path})" if path.exists() else ""
    return f"The last whole checkpoint is {found.path}: resume from it{automatically}.{found.in_words()}"
