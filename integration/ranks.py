"""Worker scripts in processes of their own, alone or on several gloo ranks of this machine.

A process that imports all libraries by itself takes most of the time of such a test. Here one process, a nursery,
imports them once for all tests of a pytest process; every worker is a fork of it and sees torchrun's variables.
Axolotl's own launcher is tested beside.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import importlib
import json
import os
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
WORKERS = ROOT / "integration" / "workers"
# not axolotl, which looks for its rank while it is imported
LIBRARIES = (
    "trl.trainer.sft_trainer",
    "transformers.models.llama.modeling_llama",
    "balora_plugin.training.trainer",
    "balora_plugin.hosts.trl",
)
TIMEOUT = 400  # seconds
# before any test: Axolotl leaves accelerate's and FSDP's variables behind in the process that reads its YAML
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_worker(script: str, *arguments: str, ranks: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    """A worker of `workers/` in a process of its own, or in one per rank; for its exit code and what it printed."""
    job: dict[str, Any] = {
        "script": str(WORKERS / script),
        "arguments": arguments,
        "ranks": ranks,
        "environment": {**ENVIRONMENT, **variables},
    }
    code, stdout, stderr = _printed(job)
    if code == -signal.SIGSEGV:  # seen once in some thousands of jobs with gloo; nothing here is native code of ours
        warnings.warn(f"{script} was run again after a segmentation fault:\n{stderr[-3000:]}", stacklevel=2)
        code, stdout, stderr = _printed(job)
    return subprocess.CompletedProcess([script, *arguments], code, stdout, stderr)


def _printed(job: dict[str, Any]) -> tuple[int, str, str]:
    """Returns a job's exit code and what it printed to stdout and stderr."""
    with tempfile.TemporaryDirectory() as directory:
        printed = [os.path.join(directory, name) for name in ("stdout", "stderr")]
        code = nursery().run({**job, "printed": printed})
        stdout, stderr = (Path(path).read_text(encoding="utf-8", errors="replace") for path in printed)
    # faulthandler's longest line would be all that tests show of the end of it
    return code, stdout, re.sub(r"^Extension modules: .*$", "", stderr, flags=re.MULTILINE)


@functools.cache
def nursery() -> Nursery:
    """The one of this process; it ends with it."""
    return Nursery()


class Nursery:
    """The client's side of the process that workers are forked from."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), ENVIRONMENT.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "integration.ranks"],
            cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: dict[str, Any]) -> int:
        """Returns the exit code of a job, negative for the signal that killed it.

        Raises:
            subprocess.TimeoutExpired: it did not end; it is killed with all its ranks.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        leader = int(self._answer(None))
        try:
            return int(self._answer(TIMEOUT))
        except subprocess.TimeoutExpired:
            os.killpg(leader, signal.SIGKILL)
            self._answer(None)
            raise

    def _answer(self, timeout: float | None) -> str:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                raise subprocess.TimeoutExpired("a worker", TIMEOUT)
        line = self._process.stdout.readline()
        assert line, "the process that forks the workers has died"
        return line


def serve(jobs: IO[str], answers: IO[str]) -> None:
    """The nursery's side: for each line of `jobs` answers the leader of its processes, then their exit code."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # accelerate collects garbage whenever a trainer starts: a second over what the libraries hold
    for line in jobs:
        leader = os.fork()
        if not leader:
            _lead(json.loads(line))
        print(leader, file=answers, flush=True)
        _, status = os.waitpid(leader, 0)
        code = os.waitstatus_to_exitcode(status)
        print(code - 256 if code > 128 else code, file=answers, flush=True)  # a signal that ended a rank


def _lead(job: dict[str, Any]) -> None:
    """Becomes the worker, or the parent of its ranks; does not return."""
    os.setsid()
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = [job["script"], *job["arguments"]]
    for stream, path in zip((1, 2), job["printed"], strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()  # a worker that is killed by a signal says where it was
    if job["ranks"] == 1:
        _work(job["script"])
    os._exit(_on_ranks(job["script"], job["ranks"]))


def _on_ranks(script: str, ranks: int) -> int:
    """The first exit code that is not 0; the other ranks are ended then, as they would wait for that one."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    running = {_fork(rank, script) for rank in range(ranks)}
    failed = 0
    while running:
        process, status = os.wait()
        running.discard(process)
        code = os.waitstatus_to_exitcode(status)
        if code and not failed:
            failed = code
            for other in running:
                os.kill(other, signal.SIGKILL)
    return failed


def _fork(rank: int, script: str) -> int:
    process = os.fork()
    if not process:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        _work(script)
    return process


def _work(script: str) -> None:
    """Runs the script and ends the process."""
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    # what libraries print while they are imported is no answer
    answering = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answering)
