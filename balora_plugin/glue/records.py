"""Records of finished runs in <OUTPUT>/runs: what each holds, and whether it is all that a later call asks for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic import write_text
from ..checkpoint.json_file import read_record
from ..checkpoint.settings import file_digest
from .tasks import GLUE_X, Task

if TYPE_CHECKING:
    from .job import Job


RECORDED = ("job", "scores", "glue_x", "glue_x_data", "kept", "steps_drawn")  # what is read of a record


@dataclass(frozen=True)
class Wanted:
    """What a call asks of a run beside its scores.

    `glue_x`: the sets' directory. `keep`: the directory for its adapter. `steps`, `taps`: optimizer steps whose
    features are drawn, and the .npz file that takes them.
    """

    glue_x: str | None = None
    keep: str | None = None
    steps: Sequence[int] = ()
    taps: str | None = None

    def held_by(self, record: dict[str, Any], task: Task) -> bool:
        """Returns whether a finished run has all of it: the sets as they are now, the adapter and the steps."""
        if self.glue_x is not None and record["glue_x_data"] != glue_x_digests(self.glue_x, task):
            return False
        if self.keep is not None and not (record["kept"] and Path(self.keep).is_dir()):
            return False
        return self.taps is None or (set(self.steps) <= set(record["steps_drawn"]) and Path(self.taps).is_file())

    def with_steps_of(self, record: dict[str, Any] | None) -> list[int]:
        """Returns the steps of this call and of those before: a repeated run writes one file for all."""
        return sorted({*self.steps, *(record["steps_drawn"] if record else ())})


def carried_over(record: dict[str, Any], before: dict[str, Any] | None, wanted: Wanted) -> dict[str, Any]:
    """Returns a repeated run's record with what the one before holds and this call did not ask for."""
    if before is None:
        return record
    keys = ["glue_x", "glue_x_data"] if wanted.glue_x is None else []
    keys += ["kept"] if wanted.keep is None else []
    keys += ["steps_drawn"] if wanted.taps is None else []
    return {**record, **{key: before[key] for key in keys}}


def data_digest(directory: str | None, task: Task) -> str:
    """Returns the SHA-256 over a task's JSONL files: a run on changed data is another one. "hub" for the hub's."""
    if directory is None:
        return "hub"
    found = hashlib.sha256()
    for split in ("train", *task.splits):
        found.update(f"{split} {_digest(Path(directory, task.name, f'{split}.jsonl'))}\n".encode())
    return found.hexdigest()


def glue_x_digests(directory: str, task: Task) -> dict[str, str]:
    """Returns {set: SHA-256 of its file} of the sets of GLUE-X for a task that there are files of."""
    files = {name: Path(directory, f"{name}.jsonl") for name in GLUE_X.get(task.name, {})}
    return {name: _digest(path) for name, path in files.items() if path.is_file()}


def _digest(path: Path) -> str:
    """Returns the SHA-256 of a file; empty for one that is not there, which reading it says in full."""
    return file_digest(path) if path.is_file() else ""


def stored(directory: str, job: Job) -> dict[str, Any] | None:
    """Returns the record of a job that has run before, None of another."""
    path = Path(directory, "runs", job.file)
    return read_record(path, RECORDED) if path.is_file() else None


def store(directory: str, job: Job, record: dict[str, Any]) -> None:
    """Writes a record whole or not at all."""
    path = Path(directory, "runs", job.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1))
