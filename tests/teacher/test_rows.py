"""What a teacher cache keeps of a token: the two forms, which is taken, and what contradicts one that exists."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_cache import HEAD, TEN, D, Teacher, V, assert_equal, opened, padded

from balora_plugin.fused import TopLogProbs
from balora_plugin.fused.head import Head
from balora_plugin.teacher import rows as teacher_rows
from balora_plugin.teacher.files import HEADER, CacheFiles
from balora_plugin.teacher.rows import AUTOMATIC_TOP_K, HIDDEN_LIMIT, HiddenRows, RowChoice, TopRows


def through(rows, hidden, head=None):
    """What comes back of these states."""
    encoded = rows.encode(hidden, head)
    assert encoded.dtype == rows.dtype
    assert encoded.shape == (len(hidden), *rows.shape)
    assert encoded.nbytes == len(hidden) * rows.size
    return rows.decode(encoded)


def test_hidden_states_are_their_bfloat16():
    hidden = torch.randn(7, 6)
    assert torch.equal(through(HiddenRows(6), hidden), hidden.bfloat16())


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("m", [0, 1, 9])
def test_log_probabilities_are_those_of_the_head(k, temperature, m):
    hidden = torch.randn(m, D)
    logits = 2.0 * (hidden @ HEAD.weight.T + HEAD.bias)
    top = through(TopRows(k, V, temperature), hidden, HEAD)
    assert [(x.dtype, tuple(x.shape)) for x in top] == [
        (torch.int32, (m, k)),
        (torch.float16, (m, k)),
        (torch.float32, (m,)),
    ]
    log_p = (logits / temperature).log_softmax(-1)
    torch.testing.assert_close(top.log_probs.float(), log_p.topk(k).values, rtol=6e-4, atol=1e-6)
    torch.testing.assert_close(log_p.gather(1, top.ids.long()), top.log_probs.float(), rtol=6e-4, atol=1e-6)
    rest = log_p.sort(dim=-1).values[:, : V - k].exp().sum(-1)
    torch.testing.assert_close(top.log_tail.exp(), rest, rtol=1e-5, atol=1e-6)


def test_log_probabilities_beyond_float16_are_cut_not_infinite():
    """An infinite one would make a reverse KL infinite, or 0 times infinity."""
    head = Head(torch.tensor([[0.0], [-1.0], [-2.0]]), None)
    top = through(TopRows(3, 3, 1e-5), torch.ones(1, 1), head)
    assert top.log_probs.tolist() == [[0.0, -65504.0, -65504.0]]
    assert top.log_tail.tolist() == [-math.inf]


def test_the_head_of_a_half_precision_model():
    head = Head(HEAD.weight.bfloat16(), HEAD.bias.bfloat16(), HEAD.scale)
    hidden = torch.randn(5, D).bfloat16()
    logits = 2.0 * torch.nn.functional.linear(hidden, head.weight, head.bias).float()
    top = through(TopRows(3, V), hidden, head)
    torch.testing.assert_close(top.log_probs.float(), logits.log_softmax(-1).topk(3).values, rtol=1e-3, atol=1e-6)


# --- which


def test_sizes():
    assert (HiddenRows(4096).size, TopRows(128, 32000).size) == (8192, 772)
    assert TopRows(7, 32000).dtype.itemsize == TopRows(7, 32000).size


def test_by_size():
    choice = RowChoice(4096, 32000, temperature=2.0)
    most = int(HIDDEN_LIMIT) // 8192
    assert choice.hidden_tokens == most
    assert choice.by_size(most)[0] == HiddenRows(4096)
    rows, why = choice.by_size(most + 1)
    assert rows == TopRows(AUTOMATIC_TOP_K, 32000, 2.0)
    assert "50 GB" in why
    assert choice.by_size(None)[0] == HiddenRows(4096)
    assert RowChoice(4096, 32000, form="mse").by_size(10**9)[0] == HiddenRows(4096)
    assert RowChoice(256, 32000).by_size(10**9)[0] == HiddenRows(256)  # smaller than 128 log-probabilities
    assert RowChoice(4096, 50).by_size(10**9)[0] == TopRows(50, 50)


def test_a_setting_decides():
    for form in ("kl", "mse"):
        assert RowChoice(4096, 32000, top_k=0, form=form).asked() == HiddenRows(4096)
    assert RowChoice(4096, 32000, top_k=64).asked() == TopRows(64, 32000, 1.0)
    assert RowChoice(4096, 32, top_k=64).asked() == TopRows(32, 32, 1.0)
    assert RowChoice(4096, 32).asked() is None


def fill(cache):
    cache.states(*padded(TEN[:3]), Teacher())
    cache.flush()
    return cache


@pytest.mark.parametrize("top_k", [0, 4])
def test_an_existing_cache_keeps_its_form(top_k, tmp_path):
    first = fill(opened(tmp_path, top_k=top_k))
    for setting in (None, top_k):
        again = opened(tmp_path, top_k=setting)
        assert again.rows == first.rows
        assert_equal(again.states(*padded(TEN[:3]), None), first.states(*padded(TEN[:3]), None))
    assert isinstance(again.states(*padded(TEN[3:]), Teacher()), TopLogProbs) == bool(top_k)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ({"top_k": 0}, {"top_k": 4}, ["teacher_cache_top_k=4", "final hidden states"]),
        ({"top_k": 4}, {"top_k": 0}, ["teacher_cache_top_k=0", "the 4 largest"]),
        ({"top_k": 4}, {"top_k": 5}, ["teacher_cache_top_k=5", "the 4 largest"]),
        ({"top_k": 4}, {"top_k": None, "temperature": 2.0}, ["temperature=2", "temperature 1", "temperature=1,"]),
        ({"top_k": 4, "temperature": 2.0}, {"top_k": 4}, ["temperature=1", "temperature 2", "temperature=2,"]),
        ({"top_k": 4}, {"top_k": None, "form": "mse"}, ["consistency='mse'", "the 4 largest"]),
        ({"top_k": 4}, {"top_k": None, "vocabulary": 12}, ["vocabulary", "11", "12"]),
    ],
)
def test_what_contradicts_an_existing_cache_is_refused(before, now, words, tmp_path):
    opened(tmp_path, **before)
    with pytest.raises(ValueError) as caught:
        opened(tmp_path, **now)
    for word in [f"teacher_cache={tmp_path}", "another directory", *words]:
        assert word in str(caught.value), word


def test_hidden_states_serve_every_temperature_and_form(tmp_path):
    fill(opened(tmp_path))
    for changes in ({"temperature": 2.0}, {"form": "mse"}, {"form": "jsd", "vocabulary": 7}):
        assert not opened(tmp_path, top_k=None, **changes).missing(*padded(TEN[:3]))


def test_log_probabilities_serve_every_form_of_their_temperature(tmp_path):
    fill(opened(tmp_path, top_k=4, temperature=2))
    for form in ("reverse_kl", "jsd"):
        assert not opened(tmp_path, top_k=None, temperature=2.0, form=form).missing(*padded(TEN[:3]))


def changed_header(directory, changes):
    """Writes a cache's header anew, with a checksum that fits it."""
    files = CacheFiles(directory)
    header = files.read_header()
    (directory / HEADER).unlink()
    files.write_header({**header, **changes})


@pytest.mark.parametrize(
    "changes", [{"top_k": 0}, {"top_k": 12}, {"top_k": "4"}, {"temperature": None}, {"dtype": "x"}]
)
def test_a_header_that_makes_no_sense_is_refused(changes, tmp_path):
    opened(tmp_path, top_k=4)
    changed_header(tmp_path, changes)
    with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
        opened(tmp_path, top_k=None)


def test_arrays_of_the_other_form_are_not_read(tmp_path):
    """As if two directories had been mixed: their documents are missing, not misread."""
    fill(opened(tmp_path / "hidden", top_k=0))
    cache = opened(tmp_path / "top", top_k=4)
    for path in (tmp_path / "hidden").glob("*.npy"):
        path.rename(tmp_path / "top" / path.name)
    cache.refresh()
    assert cache.missing(*padded(TEN[:3]))


# --- undecided


def test_what_is_undecided_is_decided_once_before_the_first_token(tmp_path):
    cache = opened(tmp_path, top_k=None)
    calls = []
    cache.choose = lambda: calls.append(0) or (TopRows(4, V), "because")
    assert cache.rows is None
    assert cache.missing(*padded(TEN[:3]))
    assert not (tmp_path / HEADER).exists()
    states = fill(cache).states(*padded(TEN[:3]), None)
    fill(cache)
    assert calls == [0]
    assert (cache.rows, cache.why) == (TopRows(4, V), "because")
    assert_equal(states, opened(tmp_path, top_k=4).states(*padded(TEN[:3]), None))


def test_undecided_without_anything_to_go_by_keeps_hidden_states(tmp_path):
    assert fill(opened(tmp_path, top_k=None)).rows == HiddenRows(D)


def test_another_process_may_be_faster_to_decide(tmp_path):
    slow, fast = opened(tmp_path, top_k=None), opened(tmp_path, top_k=4)
    fill(fast)
    slow.choose = lambda: (HiddenRows(D), "too late")
    assert slow.settle(torch.device("cpu")) == TopRows(4, V)
    assert not slow.missing(*padded(TEN[:3]))
    other = opened(tmp_path / "other", top_k=None, temperature=2.0)
    opened(tmp_path / "other", top_k=4)
    with pytest.raises(ValueError, match="temperature=2 contradicts"):
        fill(other)


def test_tokens_are_what_is_stored(tmp_path):
    cache = opened(tmp_path)
    batch = padded(TEN)
    tokens = cache.tokens(*batch)
    cache.states(*batch, Teacher())
    cache.flush()
    assert tokens == sum(len(np.load(path)) for path in tmp_path.glob("*.npy") if ".index" not in path.name)
    assert tokens > int(batch[1].sum())  # the last position of each is kept too
    assert cache.size() > tokens * cache.rows.size


def test_the_limit_is_read_where_it_stands(monkeypatch):
    monkeypatch.setattr(teacher_rows, "HIDDEN_LIMIT", 8192.0)
    assert RowChoice(4096, 32000).by_size(2)[0] == TopRows(128, 32000)
