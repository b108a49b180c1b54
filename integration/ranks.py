"""Worker scripts on several gloo ranks of this machine: `python -m integration.ranks 2 script.py arguments`.

torchrun imports torch, and then every rank all libraries by itself, most of the time such a test takes. Here they are
imported once and the ranks are forks that see torchrun's variables. Axolotl's own launcher is tested beside.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
# not axolotl, which looks for its rank while it is imported
LIBRARIES = (
    "trl.trainer.sft_trainer",
    "transformers.models.llama.modeling_llama",
    "balora_plugin.training.trainer",
    "balora_plugin.hosts.trl",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_worker(script: str, *arguments: str, ranks: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    """A worker of this folder in a process of its own, or in one per rank; for its exit code and what it printed."""
    launcher = [] if ranks == 1 else ["-m", "integration.ranks", str(ranks)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "integration" / "workers" / script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


def main() -> int:
    """The first exit code that is not 0; the other ranks are ended then, as they would wait for that one."""
    ranks, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    for name in LIBRARIES:
        importlib.import_module(name)
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
    if process:
        return process
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
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
    sys.exit(main())
