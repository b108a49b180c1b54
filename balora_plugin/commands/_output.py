"""What a command leaves: files, refused where something would be lost and there whole or not at all; tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..atomic import replacing_directory


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
    check_directory(output)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"--output {output} is not empty: name another directory, or pass --overwrite to replace it.")


def check_directory(output: str) -> None:
    """Refuses an output directory that could not be made, because a file stands there or above it.

    Raises:
        ValueError: names --output, what stands in its way, and what to write.
    """
    path = Path(output).resolve()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        what = "is a file" if there == path else f"lies in {there}, which is a file"
        raise ValueError(f"--output {output} {what}: name a directory.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"--output {output}: {there} cannot be written to: name another directory.")


@contextmanager
def writing(output: str, *, overwrite: bool) -> Iterator[str]:
    """Gives a new directory that takes the place of `output` when everything in it has been written."""
    path = Path(output).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)

    def last_look() -> None:  # has somebody else written there meanwhile?
        if path.exists():
            check_output(output, [], overwrite=overwrite)

    with replacing_directory(path, last_look) as fresh:
        yield str(fresh)


def show_markdown(text: str) -> None:
    """Prints tables and lists: drawn on a terminal, where rich is installed; elsewhere the Markdown as it is."""
    if not sys.stdout.isatty() or find_spec("rich") is None:
        print(text.rstrip("\n"))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))
