"""The teacher's states on disk: right for every arrangement of the same documents, whole after any crash."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ba_lora, reads_experts, stock, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import VOCABULARY, tiny_gpt2, tiny_llama

from balora_plugin.fused import TopLogProbs, top_log_probs
from balora_plugin.fused.head import Head
from balora_plugin.objective.batches import counted_positions
from balora_plugin.pretrained.fingerprint import model_fingerprint, tokenizer_fingerprint
from balora_plugin.teacher import cache as teacher_cache
from balora_plugin.teacher import files as cache_files
from balora_plugin.teacher.cache import TeacherCache
from balora_plugin.teacher.files import HEADER, CacheFiles
from balora_plugin.teacher.rows import RowChoice, placed

pytestmark = pytest.mark.hosts

D, V = 5, 11
ROOT = Path(__file__).parents[2]
HEAD = Head(torch.sin(torch.arange(V * D).float()).reshape(V, D), torch.cos(torch.arange(V).float()), scale=2.0)
TOP_K = 0  # of the caches that `opened` opens


@pytest.fixture(params=[0, 3], ids=["hidden", "top_k"])
def kept(request, monkeypatch):
    """Both forms of a row."""
    monkeypatch.setattr(sys.modules[__name__], "TOP_K", request.param)
    return request.param


both = pytest.mark.usefixtures("kept")


class Cache(TeacherCache):
    def states(self, inputs, counted, run):
        return super().states(inputs, counted, run, lambda: HEAD)


def opened(path, choice=None, **changes):
    names = ("hidden_size", "vocabulary", "top_k", "temperature", "form")
    values = {"hidden_size": D, "vocabulary": V, "top_k": TOP_K}
    values |= {key: changes.pop(key) for key in names if key in changes}
    return Cache(path, RowChoice(**values), **{"base": "a" * 64, "tokenizer": "b" * 64, **changes})


def as_kept(hidden, counted):
    """What a cache gives of these states: rounded, zero where not counted."""
    rows = hidden[counted]
    if not TOP_K:
        return placed(rows.bfloat16(), counted, hidden.device)
    top = top_log_probs(rows, HEAD.weight, k=TOP_K, bias=HEAD.bias, scale=HEAD.scale)
    return placed(top._replace(log_probs=top.log_probs.half()), counted, hidden.device)


def assert_kept(found, wanted):
    """To the bit for hidden states; a product of other rows may round a log-probability otherwise."""
    if isinstance(wanted, TopLogProbs):
        assert torch.equal(found.ids, wanted.ids)
        assert found.log_probs.dtype == torch.float16
        torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=2e-3, atol=0)
        torch.testing.assert_close(found.log_tail, wanted.log_tail, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def assert_equal(found, wanted):
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, TopLogProbs) else [(found, wanted)]
    assert type(found) is type(wanted)
    for a, b in pairs:
        assert torch.equal(a, b)


class Teacher:
    """States that depend on every earlier token of the document and on the position, as a causal model's do."""

    def __init__(self, leak=False, alone_differs=False):
        self.calls, self.leak, self.alone_differs = 0, leak, alone_differs

    def __call__(self, inputs):
        self.calls += 1
        ids, positions, mask = inputs["input_ids"], inputs.get("position_ids"), inputs.get("attention_mask")
        hidden = torch.full((*ids.shape, D), float("nan"))
        for row in range(ids.shape[0]):
            total = torch.zeros(D)
            for t in range(ids.shape[1]):
                position = t if positions is None else int(positions[row, t])
                if position == 0 and not self.leak:
                    total = torch.zeros(D)
                if mask is None or mask[row, t]:
                    total = total * 0.7 + torch.sin((ids[row, t] + 1.0) * torch.arange(1, D + 1) + position)
                hidden[row, t] = total * (ids.shape[0] if self.alone_differs else 1)
        return hidden


def padded(documents, length=None, left=False):
    """One document a row: (ids, counted) each, to the right of it padding."""
    length = length or max(len(ids) for ids, _ in documents)
    inputs = {"input_ids": torch.zeros(len(documents), length, dtype=torch.long)}
    inputs["attention_mask"] = torch.zeros_like(inputs["input_ids"])
    counted = torch.zeros(len(documents), length, dtype=torch.bool)
    for row, (ids, flags) in enumerate(documents):
        place = slice(length - len(ids), length) if left else slice(0, len(ids))
        inputs["input_ids"][row, place] = torch.tensor(ids)
        inputs["attention_mask"][row, place] = 1
        counted[row, place] = torch.tensor(flags)
        counted[row, (length - 1) if left else len(ids) - 1] = False  # nothing follows
    return inputs, counted


def packed(documents, padding=0, last=None):
    """All documents in one row by position_ids; `last`: whether their last positions count (None: as they say)."""
    ids = [i for document, _ in documents for i in document] + [0] * padding
    positions = [p for document, _ in documents for p in range(len(document))] + [0] * padding
    flags = []
    for _, document in documents:
        flags += [*document[:-1], document[-1] if last is None else last]
    flags[-1:] = [False]
    return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}, torch.tensor(
        [flags + [False] * padding]
    )


def expected(inputs, counted):
    return as_kept(Teacher()(inputs), counted)


TEN = [([i + 1, 7, i, 9, 3 * i + 2], [False, i % 2 == 0, True, True, False]) for i in range(10)]

document = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 12), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
    )
)


@both
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(document, min_size=1, max_size=6), data=st.data())
def test_every_arrangement_of_the_same_documents_is_served(documents, data, tmp_path_factory):
    """Padded, packed, shuffled, cut into other batches: right, and without the teacher once the documents are there."""
    cache, teacher = opened(tmp_path_factory.mktemp("cache")), Teacher()
    inputs, counted = packed(documents, padding=data.draw(st.integers(0, 3)), last=True)
    assert_kept(cache.states(inputs, counted, teacher), expected(inputs, counted))
    last, flags = documents[-1]
    if not any(flags[:-1]):  # nothing of it counted at the row's end
        cache.states(*packed([(last, flags), ([1], [False])], last=True), teacher)
    cache.flush()
    cache, before = opened(cache.directory), teacher.calls
    order = data.draw(st.permutations(documents))
    size = data.draw(st.integers(1, len(order)))
    for first in range(0, len(order), size):
        chunk = order[first : first + size]
        for batch in (padded(chunk, 12), padded(chunk), packed(chunk), packed(chunk, padding=2, last=False)):
            assert not cache.missing(*batch)
            assert_kept(cache.states(*batch, teacher), expected(*batch))
    assert teacher.calls == before


@pytest.mark.parametrize(
    "other",
    [
        ([5, 6, 7, 9], [True, True, True, False]),  # a later token
        ([4, 6, 7, 8], [True, True, True, False]),  # the first
        ([5, 6, 7, 8], [True, False, True, False]),  # counted elsewhere
        ([5, 6, 7], [True, True, True]),  # shorter
        ([5, 6, 7, 8, 0], [True, True, True, False, False]),  # a pad token that is attended
    ],
)
def test_another_document_is_missing_never_wrong(other, tmp_path):
    cache, teacher = opened(tmp_path), Teacher()
    cache.states(*padded([([5, 6, 7, 8], [True, True, True, False])]), teacher)
    batch = padded([other], 6)
    assert cache.missing(*batch)
    assert_kept(cache.states(*batch, teacher), expected(*batch))


def test_other_positions_or_a_hole_in_the_mask_are_another_document(tmp_path):
    cache, teacher = opened(tmp_path), Teacher()
    inputs, counted = padded([([5, 6, 7, 8], [True, True, True, False])])
    cache.states(inputs, counted, teacher)
    shifted = {**inputs, "position_ids": torch.tensor([[4, 5, 6, 7]])}
    assert cache.missing(shifted, counted)
    hole = {**inputs, "attention_mask": torch.tensor([[1, 0, 1, 1]])}
    assert cache.missing(hole, counted & hole["attention_mask"].bool())
    left = padded([([5, 6, 7, 8], [True, True, True, False])], 6, left=True)
    assert cache.missing(*left)
    explicit = {**left[0], "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]])}
    assert not cache.missing(explicit, left[1])
    cache.states(explicit, left[1], None)


@both
def test_a_batch_half_known_gives_what_the_cache_holds(tmp_path):
    """Also for the known half: the same as a warm run, to the bit."""
    cache = opened(tmp_path)
    inputs, counted = padded(TEN[:1])
    cache.states(inputs, counted, lambda inputs: Teacher()(inputs) + 3.0)  # as if another batch had rounded otherwise
    two = padded(TEN[:2])
    states = cache.states(*two, Teacher())
    other = Teacher()(two[0])
    other[0] += 3.0
    assert_kept(states, as_kept(other, two[1]))
    assert_equal(states, opened_after_flush(cache).states(*two, None))


def opened_after_flush(cache):
    cache.flush()
    return opened(cache.directory)


@both
def test_nothing_counted_runs_no_teacher(tmp_path):
    inputs, counted = padded(TEN)
    states = opened(tmp_path).states(inputs, counted & False, None)
    shapes = [(10, 5, 3), (10, 5, 3), (10, 5)] if TOP_K else [(10, 5, D)]
    for x, shape in zip(states if TOP_K else [states], shapes, strict=True):
        assert x.shape == shape
        assert not x.any()


def test_labels_to_positions():
    labels = torch.tensor([[-100, 5, 6, -100]])
    assert counted_positions({"labels": labels}).tolist() == [[True, True, False, False]]
    assert counted_positions({"labels": labels, "shift_labels": labels}).tolist() == [[False, True, True, False]]


# --- files


def filled(path, parts=3):
    cache = opened(path)
    for i in range(parts):
        cache.states(*padded(TEN[3 * i : 3 * i + 3]), Teacher())
        cache.flush()
    return cache


def files(path, ending):
    return sorted(p for p in path.iterdir() if p.name.endswith(ending))


def payloads(path):
    return [p for p in files(path, ".npy") if not p.name.endswith(".index.npy")]


def completed(path):
    """Opens the cache again, completes it, and checks every state; returns the number of teacher passes."""
    cache, teacher = opened(path), Teacher()
    for i in range(3):
        batch = padded(TEN[3 * i : 3 * i + 3])
        assert_kept(cache.states(*batch, teacher), expected(*batch))
    cache.flush()
    assert not any(opened(path).missing(*padded(TEN[i : i + 3])) for i in range(7))
    return cache.runs


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def flipped(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def pickled(path):
    np.save(path.open("wb"), np.array([{"key": 1}], dtype=object), allow_pickle=True)


BROKEN = {
    "payload_cut": lambda path: truncate(payloads(path)[0]),
    "payload_gone": lambda path: payloads(path)[0].unlink(),
    "payload_empty": lambda path: payloads(path)[0].write_bytes(b""),
    "payload_bit": lambda path: flip(payloads(path)[0]),
    "index_gone": lambda path: files(path, ".index.npy")[0].unlink(),
    "index_cut": lambda path: truncate(files(path, ".index.npy")[0]),
    "index_garbage": lambda path: files(path, ".index.npy")[0].write_bytes(b"garbage"),
    "index_pickle": lambda path: pickled(files(path, ".index.npy")[0]),
}


@both
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_computed_again_and_nothing_else(case, tmp_path):
    filled(tmp_path)
    BROKEN[case](tmp_path)
    assert 0 < completed(tmp_path) <= 2  # one batch, and the comparison with a document on its own
    assert completed(tmp_path) == 0


@both
def test_damage_in_every_file_at_once_is_computed_again(tmp_path):
    """The first file is given up at its first document; the others must not surprise the second reading."""
    filled(tmp_path)
    for path in payloads(tmp_path):
        flip(path)
    batch = padded([TEN[0], TEN[3], TEN[6]])  # one of each file
    assert_kept(opened(tmp_path).states(*batch, Teacher()), expected(*batch))
    assert completed(tmp_path) > 0
    assert completed(tmp_path) == 0


def documents_in(path):
    """How many entries each pair has, damaged ones too, as its index begins."""
    return sorted(cache_files._layout(index.open("rb")).shape[0] for index in files(path, ".index.npy"))


ENTRY = {
    "rows": lambda path: flip(payloads(path)[0]),  # of its last document
    "entry": lambda path: flip(files(path, ".index.npy")[0]),
    "rows_cut": lambda path: truncate(payloads(path)[0]),
    "entry_cut": lambda path: truncate(files(path, ".index.npy")[0]),
}


@both
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("case", ENTRY)
def test_a_damaged_document_alone_is_computed_again(case, old, tmp_path):
    """Its neighbours in the pair stay, for this run and for the next, also where the files have been there for long."""
    filled(tmp_path, parts=1)
    ENTRY[case](tmp_path)
    if old:
        age = time.time() - 2 * cache_files.STALE_SECONDS
        for path in files(tmp_path, ".npy"):
            os.utime(path, (age, age))
    cache, batch = opened(tmp_path), padded(TEN[:3])
    assert_kept(cache.states(*batch, Teacher()), expected(*batch))
    cache.flush()
    assert documents_in(tmp_path) == [1, 3]
    for again in (opened(tmp_path), opened(tmp_path)):
        assert_kept(again.states(*batch, refused), expected(*batch))
        assert len(again) == 3


READS = """
import sys
from test_cache import TEN, Teacher, assert_kept, expected, opened, padded
cache, batch = opened(sys.argv[1]), padded(TEN[:3])
if len(sys.argv) > 2:
    cache.frozen = "nothing may be computed"
print(len(cache), flush=True)
input()
assert_kept(cache.states(*batch, Teacher()), expected(*batch))
cache.flush()
print(cache.runs, len(cache), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "mended", [pytest.param(False, id="not_yet", marks=pytest.mark.long), pytest.param(True, id="mended")]
)
def test_what_one_process_finds_damaged_takes_nothing_from_another(mended, tmp_path):
    """The other one, which holds the old index, reads its neighbours, and the document itself where it is again."""
    filled(tmp_path, parts=1)
    flip(payloads(tmp_path)[0])
    path = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "teacher"), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", READS, str(tmp_path), *["frozen"] * mended],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        text=True,
    )
    assert process.stdout.readline() == "3\n"
    cache, batch = opened(tmp_path), padded(TEN[:3])
    assert_kept(cache.states(*batch, Teacher()), expected(*batch))
    if mended:
        cache.flush()
    out, _ = process.communicate("go on\n")
    assert process.returncode == 0
    assert out.split() == (["0", "3"] if mended else ["2", "3"])
    cache.flush()
    assert documents_in(tmp_path) == ([1, 3] if mended else [1, 1, 3])
    assert opened(tmp_path).states(*batch, refused) is not None


@both
@pytest.mark.parametrize("version", cache_files.INDEXES)
def test_no_flipped_bit_of_a_header_or_an_index_raises_or_is_believed(version, tmp_path, monkeypatch):
    """Samples of the bits of what numpy parses, of the index's entries and of the rows."""
    monkeypatch.setattr(teacher_cache, "FORMAT_VERSION", version)
    cache = opened(tmp_path)
    batch = padded(TEN[:3])
    wanted = cache.states(*batch, Teacher())
    cache.flush()
    assert json.loads((tmp_path / HEADER).read_text())["format_version"] == version
    keys = sorted(cache._files)
    (rows,), (index,) = payloads(tmp_path), files(tmp_path, ".index.npy")
    draw = random.Random(version).sample
    heads = range(8 * 128)
    bits_of = {path: [*draw(heads, 250), *draw(range(8 * 128, 8 * path.stat().st_size), 100)] for path in (rows, index)}
    whole = {path: path.read_bytes() for path in (rows, index)}
    noticed = 0
    for path, bits in bits_of.items():
        for bit in bits:
            path.write_bytes(flipped(whole[path], bit))
            found = opened(tmp_path)
            noticed += sorted(found._files) != keys
            if (held := found._read(found._cutter.cut(*batch))) is not None:
                assert_equal(placed(found.rows.decode(held), batch[1], torch.device("cpu")), wanted)
            index.write_bytes(whole[index])  # reading rows that are broken removes it
        path.write_bytes(whole[path])
    assert noticed > 0
    assert not opened(tmp_path).missing(*batch)


@both
def test_keys_that_were_exchanged_are_not_believed(tmp_path):
    cache = opened(tmp_path)
    batch = padded([TEN[0], (TEN[0][0][::-1], TEN[0][1])])  # two documents with as many rows
    cache.states(*batch, Teacher())
    cache.flush()
    (path,) = files(tmp_path, ".index.npy")
    entries = np.load(path)
    assert len(entries) == 2 and entries["rows"][0] == entries["rows"][1]
    entries["key"] = entries["key"][::-1].copy()
    np.save(path, entries)
    assert_kept(opened(tmp_path).states(*batch, Teacher()), expected(*batch))


def same_values(damaged, whole):
    try:
        return json.loads(damaged) == json.loads(whole)
    except ValueError:
        return False


@both
def test_no_flipped_bit_of_cache_json_is_believed(tmp_path):
    filled(tmp_path)
    whole = (tmp_path / HEADER).read_bytes()
    for bit in random.Random(0).sample(range(len(whole) * 8), 300):
        damaged = flipped(whole, bit)
        (tmp_path / HEADER).write_bytes(damaged)
        if same_values(damaged, whole):  # white space between them
            assert len(opened(tmp_path)) == 9
            continue
        with pytest.raises(ValueError) as caught:
            opened(tmp_path)
        assert f"teacher_cache={tmp_path}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("leads_to", [HEADER, "nowhere.json", "/dev/null"])
def test_a_header_that_is_a_link_to_nothing_is_one_line(leads_to, tmp_path):
    filled(tmp_path)
    (tmp_path / HEADER).unlink()
    (tmp_path / HEADER).symlink_to(leads_to)
    with pytest.raises(ValueError, match=f"teacher_cache={tmp_path}"):
        opened(tmp_path)


def test_a_full_disk_is_named_in_the_words_there_are(tmp_path):
    """numpy says how many numbers it could write, without a number or text of the system's."""
    cache = opened(tmp_path)
    document = ([i % V for i in range(3000)], [True] * 3000)
    cache.states(*padded([document]), Teacher())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        with pytest.raises(OSError, match=r"teacher_cache=.*: cannot be written: \d+ requested and \d+ written"):
            cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not files(tmp_path, ".tmp")
    cache.flush()
    assert len(opened(tmp_path)) == 1


@both
def test_an_index_that_cannot_be_read_just_now_is_not_removed(tmp_path, monkeypatch):
    filled(tmp_path)
    old = time.time() - 2 * cache_files.STALE_SECONDS
    for path in files(tmp_path, ".npy"):
        os.utime(path, (old, old))
    before = sorted(path.name for path in tmp_path.iterdir())

    def busy(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(cache_files, "open", busy, raising=False)
        assert len(opened(tmp_path)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert len(opened(tmp_path)) == 9


@both
def test_a_file_that_cannot_be_read_just_now_is_not_given_up(tmp_path, monkeypatch):
    cache = opened_after_flush(filled(tmp_path))
    batch = padded(TEN[:3])
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(cache_files, "RETRIES", (0.0, 0.0))
    left = [1]

    def busy(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return open(*args, **kwargs)

    monkeypatch.setattr(cache_files, "open", busy, raising=False)
    assert_kept(cache.states(*batch, refused), expected(*batch))  # read at the second try
    left[0] = 10**6
    with pytest.raises(OSError, match=f"teacher_cache={tmp_path}.*Too many open files"):
        cache.states(*batch, refused)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def refused(inputs):
    raise AssertionError("the teacher ran")


def test_a_directory_that_cannot_be_made_is_named():
    with pytest.raises(ValueError, match="teacher_cache=/proc/nowhere cannot be used"):
        CacheFiles("/proc/nowhere").read_header()


@both
def test_files_of_a_killed_process_are_ignored_and_removed_when_stale(tmp_path):
    filled(tmp_path)
    half, orphan = tmp_path / f"{'0' * 32}.npy.tmp", tmp_path / f"{'1' * 32}.npy"
    foreign = tmp_path / "notes.txt"
    for path in (half, orphan, foreign):
        path.write_bytes(b"half a fi")
    assert completed(tmp_path) == 0
    assert half.exists()  # perhaps another process is at it
    old = time.time() - 2 * cache_files.STALE_SECONDS
    for path in (half, orphan, foreign, *files(tmp_path, ".npy")):
        if path.exists():
            os.utime(path, (old, old))
    assert completed(tmp_path) == 0
    assert not half.exists() and not orphan.exists()
    assert foreign.exists()


@both
def test_a_file_that_breaks_while_open_is_computed_again(tmp_path):
    cache = opened_after_flush(filled(tmp_path))
    for path in payloads(tmp_path):
        path.write_bytes(b"")
    batch = padded(TEN[:3])
    assert_kept(cache.states(*batch, Teacher()), expected(*batch))


KILLED = """
import sys
from test_cache import Teacher, opened, padded
cache = opened(sys.argv[1])
for i in range(100000):
    cache.states(*padded([([i, i % 7, 3, i + 5], [True, True, True, False])]), Teacher())
    cache.flush()
    print(i, flush=True)
"""


def test_a_process_killed_while_writing_leaves_a_cache_without_a_wrong_state(tmp_path):
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "teacher"), *sys.path]),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=env, text=True
    )
    while int(process.stdout.readline()) < 20:
        pass
    process.kill()
    last = process.stdout.read().split()
    process.wait()
    done = int(last[-1]) if last else 20
    cache = opened(tmp_path)
    assert len(cache) > done
    for i in range(done + 3):
        batch = padded([([i, i % 7, 3, i + 5], [True, True, True, False])])
        assert_kept(cache.states(*batch, Teacher()), expected(*batch))
    assert cache.runs <= 2


@both
def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "FLUSH_BYTES", 100)
    cache = opened(tmp_path)
    for row in TEN:
        cache.states(*padded([row]), Teacher())
        assert cache._pending_bytes < 100
    assert len(payloads(tmp_path)) >= 3


@both
def test_payloads_are_plain_arrays(tmp_path):
    filled(tmp_path)
    for path in payloads(tmp_path):
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if TOP_K:
            assert rows.dtype.names == ("ids", "log_probs", "log_tail")
            assert (rows.dtype.itemsize, rows.ndim) == (6 * 3 + 4, 1)
        else:
            assert (rows.dtype, rows.shape[1]) == (np.uint16, D)
    assert {p.suffix for p in tmp_path.iterdir()} == {".npy", ".json"}
    assert json.loads((tmp_path / HEADER).read_text())["format_version"] == 2


@both
def test_two_processes_share_a_directory(tmp_path):
    one, two = opened(tmp_path), opened(tmp_path)
    one.states(*padded(TEN[:5]), Teacher())
    two.states(*padded(TEN[5:]), Teacher())
    one.flush(), two.flush()
    one.refresh()
    assert len(one) == 10
    assert not one.missing(*padded(TEN))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "c" * 64}, ["base model", "aaaaaaaa", "cccccccc"]),
        ({"tokenizer": "d" * 64}, ["tokenizer", "bbbbbbbb", "dddddddd"]),
        ({"hidden_size": 6}, ["hidden size", "5", "6"]),
        ({"precision": "bfloat16"}, ["precision", "float32", "bfloat16"]),
    ],
)
def test_a_cache_of_something_else_is_refused(changes, words, tmp_path):
    opened(tmp_path)
    with pytest.raises(ValueError) as caught:
        opened(tmp_path, **changes)
    for word in [f"teacher_cache={tmp_path}", "another directory", "delete", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("format_version", 3), ("format_version", [2]), ("kind", "logits"), ("dtype", "float16")]
)
def test_a_cache_of_another_format_is_refused(key, value, tmp_path):
    opened(tmp_path)
    header = CacheFiles(tmp_path).read_header()
    (tmp_path / HEADER).unlink()
    CacheFiles(tmp_path).write_header({**header, key: value})
    with pytest.raises(ValueError, match=re.escape(str(value))):
        opened(tmp_path)


def test_a_run_without_a_tokenizer_may_share(tmp_path):
    opened(tmp_path)
    opened(tmp_path, tokenizer=None)


def test_directories_that_are_no_cache_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        opened(tmp_path / "file")
    with pytest.raises(ValueError, match=r"holds file and no cache\.json"):
        opened(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / HEADER).write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        opened(tmp_path / "broken")


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    cache.states(*padded(TEN), Teacher())
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"teacher_cache=.*No space left"):
        cache.flush()
    assert not files(tmp_path, ".tmp")


# --- inputs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pixel_values": torch.zeros(2)}, "pixel_values in the batch"),
        ({"inputs_embeds": torch.zeros(2)}, "inputs_embeds in the batch"),
        ({"token_type_ids": torch.ones(1, 6)}, "token_type_ids in the batch"),
        ({"cu_seq_lens_q": torch.zeros(2)}, "cu_seq_lens_q in the batch"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "attention_mask of shape"),
        ({"position_ids": torch.zeros(3, 1, 6)}, "position_ids of shape"),
        ({"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7]])}, "from 2 to 5 at 3"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "attention_mask": torch.ones(1, 6)}, "see each other"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2]])}, "see each other"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]])}, "labels count position 3 of row 0"),
        ({"input_ids": None}, "a batch without input_ids"),
    ],
)
def test_inputs_that_cannot_be_known_are_refused_by_name(changes, words, tmp_path):
    inputs = {"input_ids": torch.arange(6)[None], "use_cache": False, **changes}
    with pytest.raises(ValueError) as caught:
        opened(tmp_path).states(inputs, torch.tensor([[True] * 5 + [False]]), Teacher())
    assert words in str(caught.value)
    assert "teacher_cache" in str(caught.value)


def test_lengths_beyond_the_usual_rotary_frequencies_are_refused(tmp_path):
    cache = opened(tmp_path, rope_limit=6)
    cache.states(*padded(TEN, 6), Teacher())
    with pytest.raises(ValueError, match="row of 7 positions is beyond 6"):
        cache.states(*padded(TEN, 7), Teacher())


def test_numbered_masks_are_cut_where_attention_keeps_documents_apart(tmp_path):
    """Axolotl's multipack masks; flash attention goes by position_ids."""
    cache, teacher = opened(tmp_path, attention="flash_attention_2"), Teacher()
    inputs, counted = packed(TEN[:3])
    cache.states({**inputs, "attention_mask": torch.tensor([[1] * 5 + [2] * 5 + [3] * 5])}, counted, teacher)
    assert not cache.missing(*padded(TEN[:2]))


def boundaries(inputs):
    """What TRL 1.16 gives beside position_ids."""
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten()
    edges = torch.cat([starts, torch.tensor([inputs["position_ids"].shape[1]])]).to(torch.int32)
    index = torch.repeat_interleave(torch.arange(len(starts)), edges.diff())[None]
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 5, "max_length_k": 5, "seq_idx": index}


def test_boundaries_said_once_more_must_be_those_of_the_positions(tmp_path):
    cache, teacher = opened(tmp_path), Teacher()
    inputs, counted = packed(TEN[:4], padding=2)
    more = boundaries(inputs)
    cache.states({**inputs, **more}, counted, teacher)
    assert not cache.missing(inputs, counted)
    for key in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        wrong = more[key].clone()
        wrong[..., 2:] += 1
        with pytest.raises(ValueError, match=f"{key} in the batch does not cut row 0"):
            cache.states({**inputs, **more, key: wrong}, counted, teacher)
    alone, needed = padded(TEN[:1])
    with pytest.raises(ValueError, match="cu_seq_lens_k in the batch"):
        cache.states({**alone, **more}, needed, teacher)


def test_a_teacher_that_sees_its_neighbours_is_refused(tmp_path):
    with pytest.raises(ValueError, match="states of a packed document differ"):
        opened(tmp_path / "packed").states(*packed(TEN), Teacher(leak=True))
    with pytest.raises(ValueError, match="states of a padded document differ"):
        opened(tmp_path / "padded").states(*padded(TEN), Teacher(alone_differs=True))


def test_the_comparison_runs_once(tmp_path):
    cache, teacher = opened(tmp_path), Teacher()
    for i in range(0, 10, 2):
        cache.states(*packed(TEN[i : i + 2]), teacher)
    assert teacher.calls == cache.runs == 6


def test_a_frozen_cache_names_what_it_lacks(tmp_path):
    cache = opened(tmp_path)
    cache.states(*padded(TEN[:2]), Teacher())
    cache.frozen, cache.where = "the weights have moved", "step 7"
    cache.states(*padded(TEN[:2]), None)
    with pytest.raises(RuntimeError, match=r"lacks the document at tokens 0:5 of row 2 of the batch at step 7"):
        cache.states(*padded(TEN[:3]), None)


# --- fingerprints


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_the_fingerprint_is_the_base_models_alone(model, ids):
    bare = model_fingerprint(model())
    assert model_fingerprint(model()) == bare
    wrapped = ba_lora(model())
    train(wrapped, ids)
    assert model_fingerprint(wrapped.get_base_model()) == bare
    assert model_fingerprint(stock(model(), r=2).get_base_model()) == bare
    two = stock(model(), r=2)
    two.add_adapter("second", two.peft_config["default"])
    assert model_fingerprint(two.get_base_model()) == bare


def test_trained_copies_are_left_out_and_originals_are_not(ids):
    bare = model_fingerprint(tiny_llama())
    wrapped = stock(tiny_llama(), modules_to_save=["lm_head", "norm"], targets=["q_proj"])
    train(wrapped, ids)
    assert model_fingerprint(wrapped.get_base_model()) == bare
    with torch.no_grad():
        wrapped.get_base_model().lm_head.original_module.weight[0, 0] += 1e-6
    assert model_fingerprint(wrapped.get_base_model()) != bare


@reads_experts
def test_experts_have_the_same_fingerprint_under_an_adapter():
    from models import tiny_mixtral

    wrapped = ba_lora(tiny_mixtral(), targets=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    assert model_fingerprint(wrapped.get_base_model()) == model_fingerprint(tiny_mixtral())


def test_anything_that_changes_the_states_changes_the_fingerprint():
    bare = model_fingerprint(tiny_llama())
    one_bit = tiny_llama()
    with torch.no_grad():
        weight = one_bit.model.layers[1].mlp.up_proj.weight
        weight.view(torch.int32)[0, 0] ^= 1
    swapped = tiny_llama()
    layers = swapped.model.layers
    layers[0].mlp.up_proj, layers[1].mlp.up_proj = layers[1].mlp.up_proj, layers[0].mlp.up_proj
    theta = tiny_llama()
    theta.config.rope_parameters = {**theta.config.rope_parameters, "rope_theta": 5.0}
    for other in (one_bit, swapped, theta, tiny_llama().bfloat16()):
        assert model_fingerprint(other) != bare
    same = tiny_llama()
    same.config.attention_dropout, same.config.use_cache, same.config._name_or_path = 0.3, False, "elsewhere"
    same.config.pad_token_id = 5
    assert model_fingerprint(same) == bare


def test_a_teacher_with_an_adapter_of_its_own_counts_it_in(ids):
    one, two = (ba_lora(tiny_llama()) for _ in range(2))
    train(two, ids)
    one, two = one.get_base_model(), two.get_base_model()
    assert model_fingerprint(one) == model_fingerprint(two)
    assert model_fingerprint(one, with_adapters=True) != model_fingerprint(two, with_adapters=True)


def test_weights_that_are_not_there_are_refused():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="meta device"):
        model_fingerprint(model)


def test_the_tokenizers_fingerprint_is_its_vocabulary(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.padding_side = "left"
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    other.add_tokens(["new"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(None) is None


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
def test_a_real_models_documents_packed_and_alone(model, tmp_path):
    base = model(attn_implementation="sdpa").eval()
    cache = TeacherCache(tmp_path, RowChoice(32, VOCABULARY), base="a" * 64)

    def run(inputs):
        with torch.no_grad():
            return base.base_model(**inputs, use_cache=False).last_hidden_state

    documents = [([i % VOCABULARY for i in ids], flags) for ids, flags in TEN]
    inputs, counted = packed(documents)
    cache.states(inputs, counted, run)
    alone, needed = padded(documents)
    states = cache.states(alone, needed, None)
    torch.testing.assert_close(states[needed].float(), run(alone)[needed], rtol=2e-2, atol=2e-2)
