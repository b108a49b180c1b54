"""One run at a time in an output directory: a lock of the operating system, which dies with its process."""

from __future__ import annotations

import errno
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .names import LOCK_FILE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
_HELD: set[int] = set()  # file descriptors of this process


def _let_go_in_a_fork() -> None:
    """A forked worker that outlives a killed run would keep its lock: it closes its copies."""
    for handle in _HELD:
        with suppress(OSError):
            os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_a_fork)


@contextmanager
def only_run(directory: str) -> Iterator[None]:
    """Holds an output directory for the block; nothing is held where the system has no such locks.

    Raises:
        ValueError: another process holds it; names both.
    """
    path = Path(os.path.abspath(directory), LOCK_FILE)  # a callback may change the directory that names are relative to
    handle = _acquire(path)
    try:
        yield
    finally:
        if handle is not None:
            _release(path, handle)


def _acquire(path: Path) -> int | None:
    """Returns the descriptor that holds the lock, None where there is no locking."""
    if fcntl is None:
        return None
    while True:
        try:
            os.makedirs(path.parent, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:  # the run itself will say so
            logger.debug("no lock in %s: %s", path.parent, error)
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path))
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(
                    f"output_dir={str(path.parent)!r} belongs to a run that is going on ({holder or 'another process'})"
                    ": two would mix their checkpoints. Wait for it, stop it, or name another output_dir."
                ) from None
            logger.debug("no lock in %s: %s", path.parent, error)  # a file system without locks
            return None
        if current:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
            _HELD.add(handle)
            return handle
        os.close(handle)  # its holder has ended and removed it meanwhile


def _release(path: Path, handle: int) -> None:
    with suppress(OSError):
        path.unlink()
    _HELD.discard(handle)
    with suppress(OSError):
        os.close(handle)
