"""Files and directories that are there whole or not at all, also after a crash or a loss of power."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ABANDONED = 3600.0  # seconds after which nobody writes a temporary file any more


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives the name of a temporary file beside `path`, which takes its place once the block has ended.

    The file is flushed to the disk before it is renamed, and its directory after. A block that raises leaves `path` as
    it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush_names(path.parent)
    finally:
        with suppress(OSError):  # a rename onto another name of the same file leaves both
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file whole or not at all."""
    remove_abandoned(path)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def create_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file whole, unless another process has written it meanwhile: then that one stays."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        try:
            os.link(temporary, path)  # unlike a rename it never replaces what is there
        except FileExistsError:
            return
        except OSError:  # a file system without links
            os.replace(temporary, path)
        _flush_names(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_abandoned(path: str | os.PathLike[str], age: float = ABANDONED) -> None:
    """Removes what processes that were killed left of writing `path`; a young file may still be being written.

    `age`: the seconds after which it is not; 0 for a caller who alone writes there.
    """
    path = Path(path)
    for left in (path.with_name(f"{path.name}.tmp"), *path.parent.glob(f"{glob.escape(path.name)}.*.tmp")):
        with suppress(OSError):  # another process removes as well
            if left.stat().st_mtime <= time.time() - age:
                left.unlink()


@contextmanager
def replacing_directory(path: str | os.PathLike[str], last_look: Callable[[], None]) -> Iterator[Path]:
    """Gives a new directory beside `path`, which takes its place, whatever is there, once the block has ended.

    `last_look` is called right before, after what takes time; where it raises, `path` stays as it is.
    """
    path = Path(path)
    begun = f".{path.name}.tmp."
    for left in path.parent.glob(f"{glob.escape(begun)}*"):  # of processes that were killed: a merged model is large
        if _last_written(left) <= time.time() - ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=begun, dir=path.parent))
    try:
        yield fresh
        os.chmod(fresh, 0o777 & ~_umask())  # mkdtemp's is private
        for directory, _, names in os.walk(fresh):
            for name in names:
                _flush(Path(directory, name))
            _flush_names(Path(directory))
        old = None
        last_look()
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(old / path.name)
        fresh.replace(path)
        _flush_names(path.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _last_written(directory: Path) -> float:
    """Returns when something in a directory was written last; now, where that cannot be told."""
    try:
        return max(each.stat().st_mtime for each in (directory, *directory.rglob("*")))
    except OSError:  # another process removes as well
        return time.time()


def reason(error: OSError) -> str:
    """Returns the system's words for an error, or its own where it has none (numpy's of a full disk: bytes written)."""
    return error.strerror or " ".join(str(error).split()) or type(error).__name__


def _flush(path: Path) -> None:
    """Has the system write a file to the disk; an error in doing so (a full disk) is the caller's."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system that has no such thing
            raise
    finally:
        os.close(handle)


def _flush_names(directory: Path) -> None:
    """The same for the names in a directory, where the system can open one (Windows cannot)."""
    with suppress(OSError):
        _flush(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
