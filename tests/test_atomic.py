"""Files and directories that are there whole or not at all."""

from __future__ import annotations

import ast
import errno
import os
import stat
from pathlib import Path

import pytest

import balora_plugin
from balora_plugin import atomic

PACKAGE = Path(balora_plugin.__file__).parent
# what writes something that another process, or a run after a crash, reads
WRITERS = {
    "adapter/saved/writing.py": "replacing",
    "adapter/start/disk_cache.py": "replacing",
    "checkpoint/settings.py": "write_text",
    "commands/_output.py": "replacing_directory",
    "glue/records.py": "write_text",
    "teacher/files.py": "create_text",
}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def failing_fsync(code):
    def fsync(handle):
        raise OSError(code, os.strerror(code))

    return fsync


def test_a_text_is_written_and_written_over(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_text(path, "one")
    atomic.write_text(str(path), "zwei ü")
    assert path.read_bytes() == "zwei ü".encode()
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_block_that_raises_leaves_what_was_there_and_no_temporary_file(tmp_path, before):
    path = tmp_path / "a.bin"
    if before is not None:
        path.write_text(before)

    def die_half_way():
        with atomic.replacing(path) as temporary:
            assert temporary.parent == tmp_path and temporary != path
            temporary.write_bytes(b"half")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        die_half_way()
    assert names(tmp_path) == ([] if before is None else ["a.bin"])
    assert before is None or path.read_text() == before


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic.replacing(path):
        pass
    assert path.read_text() == "old" and names(tmp_path) == ["a.bin"]


def test_two_writers_at_once_have_a_temporary_file_each(tmp_path):
    path = tmp_path / "a.bin"
    with atomic.replacing(path) as one, atomic.replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and names(tmp_path) == ["a.bin"], "whole, and the last to end"


def test_a_created_file_is_never_replaced(tmp_path):
    path = tmp_path / "header.json"
    atomic.create_text(path, "first")
    atomic.create_text(path, "second")
    assert path.read_text() == "first" and names(tmp_path) == ["header.json"]


def test_a_file_is_created_where_there_are_no_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    atomic.create_text(tmp_path / "header.json", "first")
    assert (tmp_path / "header.json").read_text() == "first" and names(tmp_path) == ["header.json"]


@pytest.mark.parametrize("write", [atomic.write_text, atomic.create_text])
def test_a_full_disk_is_said_and_leaves_nothing_new(tmp_path, monkeypatch, write):
    monkeypatch.setattr(os, "fsync", failing_fsync(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a.json", "text")
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_is_no_error(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", failing_fsync(code))
    atomic.write_text(tmp_path / "a.json", "text")
    assert (tmp_path / "a.json").read_text() == "text"


def test_a_file_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    fsync = os.fsync

    def watched(handle):
        kind = "directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        seen.append((kind, (tmp_path / "a.json").exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    atomic.write_text(tmp_path / "a.json", "text")
    assert seen == [("file", False), ("directory", True)]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_directory_takes_the_place_of_the_one_before_whole(tmp_path, before):
    path = tmp_path / "out"
    if before is not None:
        path.mkdir()
        (path / before).write_text("old")
    with atomic.replacing_directory(path, lambda: None) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "a").write_text("new")
        assert path.exists() is (before is not None)
    assert names(tmp_path) == ["out"] and names(path) == ["sub"]
    assert (path / "sub" / "a").read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="modes")
def test_the_last_look_comes_after_all_that_takes_time(tmp_path, monkeypatch):
    """Somebody else's files that appear while a large directory is flushed are not replaced unseen."""
    path, flush = tmp_path / "out", atomic._flush

    def slowly(file):
        path.mkdir(exist_ok=True)
        (path / "precious").write_text("somebody else's")
        flush(file)

    def look():
        if path.exists():
            raise ValueError("not empty")

    monkeypatch.setattr(atomic, "_flush", slowly)
    with pytest.raises(ValueError, match="not empty"), atomic.replacing_directory(path, look) as fresh:
        (fresh / "file").write_text("ours")
    assert [entry.name for entry in tmp_path.rglob("*")] == ["out", "precious"]


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path):
    old = [tmp_path / "a.json.tmp", tmp_path / "a.json.0123.tmp"]
    young, other = tmp_path / "a.json.4567.tmp", tmp_path / "b.json.0123.tmp"
    for path in (*old, young, other):
        path.write_text("half")
    for path in (*old, other):
        os.utime(path, (0, 0))
    atomic.write_text(tmp_path / "a.json", "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", young.name, other.name]


def test_directories_of_killed_processes_are_removed_once_they_are_old(tmp_path):
    """A merged model is gigabytes, in a directory that `ls` does not show."""
    old, young, busy = (tmp_path / f".out.tmp.{name}" for name in ("old", "young", "busy"))
    others = [tmp_path / ".out.settings", tmp_path / ".other.tmp.old"]
    for path in (old, young, busy, *others):
        path.mkdir()
        (path / "model").write_text("half")
    for path in (old, busy, *others):
        os.utime(path / "model", (0, 0))
        os.utime(path, (0, 0))
    os.utime(busy / "model")  # a large file takes long, and its directory does not change meanwhile
    with atomic.replacing_directory(tmp_path / "out", lambda: None):
        pass
    assert names(tmp_path) == sorted(path.name for path in (young, busy, *others, tmp_path / "out"))


def test_a_directory_is_as_open_as_any_that_is_made(tmp_path):
    with atomic.replacing_directory(tmp_path / "out", lambda: None):
        pass
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_directory_whose_block_raises_leaves_the_one_before(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "old").write_text("old")

    def die_half_way():
        with atomic.replacing_directory(path, lambda: None) as fresh:
            (fresh / "new").write_text("half")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        die_half_way()
    assert names(tmp_path) == ["out"] and names(path) == ["old"]


def test_a_directory_on_a_full_disk_is_said_and_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.mkdir()
    monkeypatch.setattr(os, "fsync", failing_fsync(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"), atomic.replacing_directory(path, lambda: None) as fresh:
        (fresh / "new").write_text("text")
    assert names(tmp_path) == ["out"] and names(path) == []


def calls(path):
    """(what is called, as it is written; the call) of a source file."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in nodes]


@pytest.mark.parametrize(("file", "name"), WRITERS.items())
def test_what_others_read_is_written_by_these(file, name):
    assert name in dict(calls(PACKAGE / file))


def test_no_other_file_of_the_package_renames_one_into_place():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "atomic.py":
            continue
        for name, node in calls(path):
            assert name not in ("os.replace", "os.rename", "os.fsync", "tempfile.mkdtemp", "tempfile.mkstemp"), path
            assert not name.endswith(".rename"), path
            # str.replace takes two, dataclasses.replace an object and keywords, Path.replace the new name alone
            assert not (name.endswith(".replace") and len(node.args) == 1 and not node.keywords), (path, name)
