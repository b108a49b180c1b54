"""The lock of an output directory: one process at a time, and none once its process is gone."""

from __future__ import annotations

import os
import signal
import time

import pytest

from balora_plugin.checkpoint import lock
from balora_plugin.checkpoint.lock import only_run
from balora_plugin.checkpoint.names import LOCK_FILE

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="this system has no such locks")


def holder(directory, *, worker=False):
    """A forked process that holds the directory; `worker`: and has forked one of its own that outlives it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with only_run(directory):
            if worker and not os.fork():
                time.sleep(10)
            os.write(writing, str(os.getpid()).encode())
            time.sleep(60)
        os._exit(0)
    os.read(reading, 20)
    return child


def end(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


@pytest.mark.parametrize("worker", [False, True])
def test_a_second_process_is_refused_until_the_first_is_gone(worker, tmp_path):
    first = holder(str(tmp_path), worker=worker)
    try:
        with pytest.raises(ValueError, match=rf"output_dir='{tmp_path}'.*process {first} on"), only_run(str(tmp_path)):
            pass
    finally:
        end(first)
    with only_run(str(tmp_path)):  # a file that it left does not refuse anybody
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()


def test_one_process_holds_it_again_and_makes_the_directory(tmp_path):
    for _ in range(2):
        with only_run(str(tmp_path / "new" / "out")):
            pass
    assert os.listdir(tmp_path / "new" / "out") == []


def test_another_directory_is_another_lock(tmp_path):
    with only_run(str(tmp_path / "one")), only_run(str(tmp_path / "two")):
        with pytest.raises(ValueError, match="one"), only_run(str(tmp_path / "one")):
            pass
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "two")
        with pytest.raises(ValueError, match="link"), only_run(str(link)):
            pass


def test_without_locks_a_run_goes_on(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(95, "not supported")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with only_run(str(tmp_path)), only_run(str(tmp_path)):
        pass
    monkeypatch.setattr(lock, "fcntl", None)
    with only_run(str(tmp_path)), only_run(str(tmp_path)):
        pass
