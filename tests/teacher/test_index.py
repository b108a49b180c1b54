"""The index of a teacher cache: a dict's answers, in a tenth of its memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balora_plugin.teacher import index as module
from balora_plugin.teacher.files import INDEXES, CacheFiles
from balora_plugin.teacher.index import Index

# few keys, so that documents come again; halves of each other's, so that neither half alone decides
HALVES = [bytes([n]) * 8 for n in (0, 1, 127, 128, 255)]
KEYS = st.tuples(st.sampled_from(HALVES), st.sampled_from(HALVES)).map(b"".join)  # of 0 alone: no document
SHARDS = st.lists(st.lists(KEYS, min_size=1, max_size=6, unique=True), max_size=4)


def array(keys):
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)


def places(index):
    return {key: tuple(index.find(key))[1:] for key in index}


def first_of(shards):
    found = {}
    for name, keys in shards:
        for row, key in enumerate(keys):
            if any(key):
                found.setdefault(key, (name, row))
    return found


@settings(deadline=None, max_examples=150)
@given(SHARDS, SHARDS, st.integers(0, 7), st.sampled_from([1, 3, 100]))
def test_the_index_is_a_dict_of_the_first_of_each_key(read, added, dropped, recent):
    shards = [(f"read{i}", keys) for i, keys in enumerate(read)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RECENT", recent)
        index = Index([(name, array(keys)) for name, keys in shards])
        assert places(index) == first_of(shards)
        for i, keys in enumerate(added):
            index.add(f"added{i}", keys)
            shards.append((f"added{i}", keys))
    expected = first_of(shards)
    assert places(index) == expected and len(index) == len(expected)
    absent = {a + b for a in HALVES for b in HALVES} - expected.keys()
    assert not any(key in index or index.find(key) for key in absent)
    numbers = [index.find(key).number for key in expected]
    assert len(set(numbers)) == len(numbers) and not any(map(index.is_verified, numbers))
    if expected:  # where it is forgotten, the next pair that has it is where it is
        key = next(iter(expected))
        index.forget(key, index.find(key).number)
        others = {name: place for name, place in expected.items() if name != key}
        assert places(index) == others and len(index) == len(others) and key not in index
        index.add("again", [key])
        shards.append(("again", [key]))
        expected[key] = ("again", 0)
        assert places(index) == expected and len(index) == len(expected)
    if dropped < len(shards):
        name = shards[dropped][0]
        index.drop(name)
        left = {key: place for key, place in expected.items() if place[0] != name}
        assert places(index) == left and len(index) == len(left)


def test_a_document_takes_a_tenth_of_what_a_dict_takes():
    """A key of bytes and a place beside it were 260 bytes; what is added counts until it has joined the arrays."""
    draw = np.random.default_rng(0)
    index = Index([(str(i), draw.integers(0, 256, (20000, 16), np.uint8)) for i in range(5)])
    assert index.memory() == 21 * 100_000
    for i in range(7):
        index.add(f"new{i}", [key.tobytes() for key in draw.integers(0, 256, (10000, 16), np.uint8)])
    assert len(index) == 170_000 and index.memory() == 21 * 170_000


@pytest.fixture(params=list(INDEXES), ids="version {}".format)
def files(request, tmp_path):
    """Two pairs of files of a version, read from disk."""
    made = CacheFiles(tmp_path)
    made.version, made.shape = request.param, (3,)
    for begin in (1, 41):
        made.write({bytes([n]) * 16: np.full((n % 4 + 1, 3), n, np.uint16) for n in range(begin, begin + 40)})
    opened = CacheFiles(tmp_path)
    opened.version, opened.shape = request.param, (3,)
    opened.refresh()
    return opened


def test_what_is_here_is_known_without_a_file_being_read(files, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a file is read")

    monkeypatch.setattr("balora_plugin.teacher.files.open", refuse, raising=False)
    assert all(bytes([n]) * 16 in files for n in range(1, 81)) and bytes([81]) * 16 not in files
    assert sorted(files) == [bytes([n]) * 16 for n in range(1, 81)]


def test_rows_are_read_by_the_entries_of_both_versions(files):
    for n in range(1, 81):
        np.testing.assert_array_equal(files.read(bytes([n]) * 16), np.full((n % 4 + 1, 3), n, np.uint16))
    assert files.read(bytes([81]) * 16) is None


@pytest.mark.parametrize("damage", ["key", "start", "rows", "cut", "gone"])
def test_an_entry_that_changed_since_it_was_read_is_not_believed(files, damage, tmp_path):
    """It is forgotten, all others stay; with the index all of its pair. Before, only its key was kept."""
    key = bytes([7]) * 16
    (path,) = [path for path in tmp_path.glob("*.index.npy") if (np.load(path)["key"] == 7).any()]
    entries = np.load(path)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: -entries.dtype.itemsize * 35])
    elif damage == "rows" and files.version == 1:  # the rows' own checksum notices
        entries["rows"][6] = 1
        np.save(path, entries)
    else:
        entries[damage][6] = entries[damage][7]
        np.save(path, entries)
    assert files.read(key) is None
    assert len(files) == (40 if damage == "gone" else 79) and key not in files
    assert path.exists() == (damage != "gone")


def test_an_earlier_release_reads_what_is_written(files, tmp_path):
    """The files are what they were: sizes and names of the entries' fields."""
    for path in tmp_path.glob("*.index.npy"):
        assert np.load(path).dtype == INDEXES[files.version]
    assert not json.dumps(sorted(path.suffix for path in tmp_path.iterdir())).count("sorted")
