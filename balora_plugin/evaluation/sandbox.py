"""Generated programs, run in a process of their own with limits on time, memory and files. No jail: see docs.

The process has no terminal, an empty directory, an empty environment and a group of its own that is killed at the end.
The network and files that its user may read are not closed to it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

# what the process runs: its limits, then the program, then the word that says that it came to its end
_RUNNER = """
import os, sys
from resource import RLIMIT_AS, RLIMIT_CORE, RLIMIT_CPU, RLIMIT_FSIZE, setrlimit
seconds, size, out = (int(text) for text in sys.argv[1:4])
word, program = sys.stdin.readline().strip(), sys.stdin.read()
for limit, value in ((RLIMIT_AS, size), (RLIMIT_CPU, seconds), (RLIMIT_FSIZE, 1 << 20), (RLIMIT_CORE, 0)):
    setrlimit(limit, (value, value))
exec(compile(program, "program", "exec"), {"__name__": "program"})
os.write(out, word.encode())
"""


@dataclass(frozen=True)
class Limits:
    """What a program may take: seconds, by the clock and of a processor, and MiB of memory."""

    seconds: float = 10.0
    megabytes: int = 1024


_LIMITS: ContextVar[Limits | None] = ContextVar("limits", default=None)


@contextlib.contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Sets the limits of the programs that are run inside the block."""
    token = _LIMITS.set(limits)
    try:
        yield
    finally:
        _LIMITS.reset(token)


def check_sandbox() -> None:
    """Refuses a machine on which no program would pass.

    Raises:
        ValueError: an empty program does not come to its end within the limits.
    """
    if not passes("pass"):
        limits = _LIMITS.get() or Limits()
        raise ValueError(
            f"an empty program does not run here within {limits.seconds:g} s and {limits.megabytes} MiB: raise "
            "--code-seconds and --code-megabytes, or use a machine with POSIX limits (Linux)."
        )


def passes(program: str) -> bool:
    """Runs a Python program; returns whether it came to its end, and not by leaving early, within the limits."""
    limits = _LIMITS.get() or Limits()
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="balora-eval-") as directory:
        read, write = os.pipe()
        try:
            code = _run(program, word, limits, (directory, write))
        finally:
            os.close(write)
            with open(read, "rb") as file:  # whoever still holds the other end is gone: the whole group was killed
                os.set_blocking(file.fileno(), False)
                said = file.read(len(word)) or b""
    return code == 0 and said == word.encode()


def _run(program: str, word: str, limits: Limits, place: tuple[str, int]) -> int | None:
    """Returns the exit code, or None where the time was over."""
    directory, write = place
    arguments = [str(max(1, round(limits.seconds))), str(limits.megabytes << 20), str(write)]
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _RUNNER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": directory, "PATH": os.defpath},
        pass_fds=(write,),
        start_new_session=True,
    )
    until = time.monotonic() + limits.seconds
    try:
        process.communicate(f"{word}\n{program}".encode(errors="replace"), timeout=until - time.monotonic())
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started too
        process.wait()
