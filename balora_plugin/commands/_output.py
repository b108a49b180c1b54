"""Writing a directory whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(output: str, inputs: list[str | None], *, overwrite: bool) -> None:
    """Refuses an output that would destroy something; called before any work is done.

    Raises:
        ValueError: names --output and what to write.
    """
    path = Path(output).resolve()
    for source in inputs:
        if source is None or not os.path.exists(source):
            continue
        other = Path(source).resolve()
        if path == other or path in other.parents:
            raise ValueError(f"--output {output} is, or holds, the input {source}: name another directory.")
    if path.is_file():
        raise ValueError(f"--output {output} is a file: name a directory.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"--output {output} is not empty: name another directory, or pass --overwrite to replace it.")


@contextmanager
def writing(output: str, *, overwrite: bool) -> Iterator[str]:
    """A new directory beside `output` that takes its place when everything in it has been written."""
    path = Path(output).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield str(fresh)
        os.chmod(fresh, 0o777 & ~_umask())  # mkdtemp's is private
        old = None
        if path.exists():
            check_output(output, [], overwrite=overwrite)  # written by somebody else meanwhile?
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(old / path.name)
        fresh.replace(path)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
