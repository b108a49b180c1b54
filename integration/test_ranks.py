"""What tests hear of a worker that crashes."""

from __future__ import annotations

import signal

import pytest

from .ranks import run_worker

# the second argument: how often to crash
_CRASHES = """
import os, pathlib, signal, sys
tries = pathlib.Path(sys.argv[1] + os.environ.get("RANK", ""))
count = len(tries.read_text()) if tries.exists() else 0
tries.write_text("x" * (count + 1))
if count < int(sys.argv[2]) and os.environ.get("RANK", "1") == "1":
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_segmentation_fault_is_told_with_its_place_and_tried_once_more(ranks, tmp_path):
    script = tmp_path / "crashes.py"
    script.write_text(_CRASHES)
    with pytest.warns(UserWarning, match="(?s)again after a segmentation fault.*crashes.py"):
        assert run_worker(str(script), str(tmp_path / "once"), "1", ranks=ranks).returncode == 0
    with pytest.warns(UserWarning, match="again after a segmentation fault"):
        done = run_worker(str(script), str(tmp_path / "always"), "9", ranks=ranks)
    assert done.returncode == -signal.SIGSEGV
    assert "crashes.py" in done.stderr
