"""ba_lora_checkpoint.json: what makes the files of a checkpoint one thing. Their hashes, written after all of them.

A checkpoint begins with an open manifest, which lists nothing, and is sealed once the Trainer has written its last
file: a save that a crash cuts short anywhere leaves an open one. A checkpoint without any was written by a release that
had none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .._version import __version__
from ..atomic import write_text
from ..distributed import ranks_here
from .names import HEAD_FILE, MANIFEST_FILE, OPTIMIZER_FILE, SCALER_FILE, SCHEDULER_FILE, SETTINGS_FILE, STATE_FILE
from .settings import file_digest

# the largest number of half precision, in which every adapter and model ends up being served: a weight beyond it
# would be inf there, and pre-trained weights stay below a thousand
LARGEST = 65504.0
_ONCE = (OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE, HEAD_FILE, STATE_FILE)
# of every adapter, which PEFT saves in a directory of its name unless that is "default", and of full fine-tuning
_WEIGHTS = ("adapter_model*.safetensors", "model*.safetensors", "adapter_model*.bin", "pytorch_model*.bin")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's manifest says.

    Attributes:
        sha256: Hashes of its files, by their path inside the checkpoint; empty while it is being written.
        ranks: The ranks whose random states belong to it; none of a single process.
        save_only_model: The run leaves optimizer, scheduler and random states out.
        largest: The largest magnitude of all values that trained.
        terms: The settings of the run's terms, every one resolved; None of an earlier release, or a run without terms.
        rows: The numbers whose product is how many rows an optimizer step takes; None of an earlier release.
        settings: What else of the host's arguments makes the run what it is; None of an earlier release.
    """

    sha256: dict[str, str] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    save_only_model: bool = False
    largest: float | None = None
    terms: dict[str, Any] | None = None
    rows: dict[str, int] | None = None
    settings: dict[str, Any] | None = None

    def required(self, adapters: Sequence[str], *, sharded: bool) -> list[str]:
        """Returns the files that have to be listed; `sharded`: an engine keeps weights and optimizer in its own."""
        own = [] if self.save_only_model or sharded else [OPTIMIZER_FILE, SCHEDULER_FILE]
        states = [] if self.save_only_model else random_states(self.ranks)
        return [STATE_FILE, *own, *states, *([] if sharded else [settings_path(name) for name in adapters])]

    def replaceable(self) -> set[str]:
        """Returns the files that a run with a fresh optimizer does without."""
        return {OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE, *random_states(self.ranks)}


def random_states(ranks: Sequence[int]) -> list[str]:
    """Returns a Trainer's files of random states; of no ranks: those of a single process."""
    return [f"rng_state_{rank}.pth" for rank in ranks] or ["rng_state.pth"]


def settings_path(adapter: str) -> str:
    """Returns where a checkpoint has the ba_lora.json of an adapter of this name."""
    return SETTINGS_FILE if adapter == "default" else f"{adapter}/{SETTINGS_FILE}"


def open_manifest(directory: str) -> None:
    """Writes a manifest that lists nothing, before any other file of the checkpoint."""
    os.makedirs(directory, exist_ok=True)
    _write(directory, Manifest())


def seal(directory: str, adapters: Sequence[str], known: Manifest) -> None:
    """Writes the hashes of everything that training is resumed from, once all of it is there, beside what is `known`.

    Files that FSDP or DeepSpeed keep parts of weights and optimizers in are left out.
    """
    path, ranks = Path(directory), ranks_here()
    names = [*_ONCE, *random_states(ranks), *(settings_path(name) for name in adapters)]
    for pattern in _WEIGHTS:
        found = sorted([*path.glob(pattern), *path.glob(f"*/{pattern}")])
        names += [file.relative_to(path).as_posix() for file in found if not _is_left_over(file)]
    hashes = {name: file_digest(path / name) for name in names if (path / name).is_file()}
    _write(directory, replace(known, sha256=hashes, ranks=ranks))


def _is_left_over(weights: Path) -> bool:
    """Whether weights are a pickle that lies beside the safetensors which are loaded in its place."""
    loaded = "adapter_model*.safetensors" if weights.name.startswith("adapter_") else "model*.safetensors"
    return weights.suffix == ".bin" and any(weights.parent.glob(loaded))


def read_manifest(directory: str | os.PathLike[str]) -> Manifest | None:
    """Returns a checkpoint's manifest; None where it was written before there were any.

    Raises:
        ValueError: it is damaged.
    """
    path = Path(directory, MANIFEST_FILE)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        needed = {key: content[key] for key in ("sha256", "ranks", "save_only_model", "largest")}
        found = Manifest(**needed, **{key: content.get(key) for key in ("terms", "rows", "settings")})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{MANIFEST_FILE} is cut short or damaged") from None
    hashed = isinstance(found.sha256, dict) and all(isinstance(value, str) for value in found.sha256.values())
    typed = isinstance(found.largest, (int, float, type(None)))
    typed = typed and all(isinstance(each, (dict, type(None))) for each in (found.terms, found.settings))
    typed = typed and (found.rows is None or _are_numbers(found.rows))
    if not (hashed and typed and isinstance(found.ranks, list)):
        raise ValueError(f"{MANIFEST_FILE} is damaged")
    return found


def _are_numbers(rows: Any) -> bool:
    return isinstance(rows, dict) and all(type(value) is int and value > 0 for value in rows.values())


def manifest_flaw(
    directory: str, found: Manifest, adapters: Sequence[str], *, sharded: bool, fresh_optimizer: bool = False
) -> str | None:
    """Returns which file is missing, or not the one that was saved with the others; None if all are.

    `fresh_optimizer`: a run that goes without the optimizer's files and the random states, where they are missing.
    """
    optional = found.replaceable() if fresh_optimizer else set()
    if not found.sha256:
        return f"{MANIFEST_FILE}, which is written last, lists nothing yet"
    for name in found.required(adapters, sharded=sharded):
        if name not in found.sha256 and name not in optional:
            return f"{name} is missing" if not Path(directory, name).exists() else f"{name} was not saved with the rest"
    for name, digest in found.sha256.items():
        path = Path(directory, name)
        if not path.is_file():
            if name in optional:
                continue
            return f"{name} is missing"
        if file_digest(path) != digest:
            return (
                f"{name} is not the file that was saved with the others (if you changed it on purpose, remove "
                f"{MANIFEST_FILE}: nothing is compared then)"
            )
    return None


def _write(directory: str, manifest: Manifest) -> None:
    content: dict[str, Any] = {"format_version": 1, "balora_plugin_version": __version__, **vars(manifest)}
    write_text(Path(directory, MANIFEST_FILE), json.dumps(content, indent=2))
