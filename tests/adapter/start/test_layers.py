"""The start of all layers: once per job over its ranks, kept on disk for the next run, never from another weight."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path

import pytest
import torch
from forked import on_two_ranks
from helpers import ba_lora, logits
from models import tiny_llama, tiny_mixtral
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from balora_plugin.adapter.start import disk_cache, layers
from balora_plugin.adapter.start.disk_cache import StartCache, cache_directory

pytestmark = pytest.mark.hosts


@pytest.fixture(autouse=True)
def _unsaid():
    disk_cache._warn_once.cache_clear()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The cache in a directory of its own, for matrices of any size; how many were factorised."""
    monkeypatch.setenv("BALORA_CACHE", str(tmp_path))
    monkeypatch.setattr(disk_cache, "SMALLEST", 0)
    count = []
    original = disk_cache.pissa_factors
    monkeypatch.setattr(
        disk_cache, "pissa_factors", lambda weight, *args, **kw: count.append(1) or original(weight, *args, **kw)
    )
    return tmp_path / "starts", count


def factors(model):
    return {name: p for name, p in model.state_dict().items() if "frozen_" in name}


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("start", ["pissa", "pissa_fast", "pissa_exact"])
def test_a_second_run_factorises_nothing_and_starts_alike(build, start, store, ids):
    directory, count = store
    first = ba_lora(build(), init_lora_weights=start)
    made = len(count)
    assert made == len(list(directory.iterdir())) > 0
    second = ba_lora(build(), init_lora_weights=start)
    assert len(count) == made
    expected = factors(first)
    assert all(torch.equal(p, expected[name]) for name, p in factors(second).items())
    assert torch.equal(logits(first.eval(), ids), logits(build().eval(), ids))


def test_the_bar_names_the_layer_and_its_time_left_goes_by_entries(store, monkeypatch):
    shown = io.StringIO()

    def bar(**given):
        return tqdm(**{**given, "disable": False, "file": shown, "mininterval": 0})

    monkeypatch.setattr(layers, "tqdm", bar)
    base = tiny_llama()
    model = ba_lora(base, targets=["q_proj", "down_proj"])
    entries = sum(layer.weight.numel() for name, layer in model.named_modules() if name.endswith("base_layer"))
    lines = shown.getvalue().split("\r")
    assert "BA-LoRA start (pissa)" in lines[-1] and "layers.1.mlp.down_proj" in lines[-1]
    assert any("layers.0.self_attn.q_proj" in line for line in lines)
    said = tqdm.format_sizeof(entries)
    assert f"{said}/{said}" in lines[-1]


def test_what_the_factors_depend_on_is_in_the_key(store):
    directory, count = store
    weight = torch.randn(12, 8)
    cases = [
        (weight, 2, 1.0, "pissa_exact"),
        (weight, 3, 1.0, "pissa_exact"),
        (weight, 2, 0.5, "pissa_exact"),
        (weight, 2, 1.0, "pissa"),
        (weight, 2, 1.0, "pissa_fast"),
        (weight.bfloat16(), 2, 1.0, "pissa_exact"),
        (weight.T.contiguous(), 2, 1.0, "pissa_exact"),
        (weight + 1e-6, 2, 1.0, "pissa_exact"),
        (weight.reshape(8, 12), 2, 1.0, "pissa_exact"),  # the same bytes
    ]
    for case, rank, scaling, method in cases:
        StartCache(directory).factors(case, rank, scaling, method=method)
    assert len(count) == len(list(directory.iterdir())) == len(cases)
    in_memory = weight.T.contiguous().T  # the same matrix
    transposed = StartCache(directory).factors(in_memory, 2, 1.0, method="pissa_exact")
    assert len(count) == len(cases)
    assert torch.equal(transposed[0], StartCache(directory).factors(weight, 2, 1.0, method="pissa_exact")[0])


def damage_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_value(path):
    tensors = load_file(path)
    said = {"sha256": "0" * 64}
    save_file({**tensors, "A0": tensors["A0"] + 1}, path, said)


def damage_shape(path):
    save_file({"A0": torch.zeros(1, 1), "B0": torch.zeros(1, 1)}, path, {"sha256": ""})


@pytest.mark.parametrize("damage", [damage_half, damage_value, damage_shape])
def test_a_damaged_file_is_made_anew(damage, store):
    directory, count = store
    weight = torch.randn(12, 8)
    expected = StartCache(directory).factors(weight, 2, 1.0, method="pissa_exact")
    (path,) = directory.iterdir()
    damage(path)
    again = StartCache(directory).factors(weight, 2, 1.0, method="pissa_exact")
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
    assert len(count) == 2
    StartCache(directory).factors(weight, 2, 1.0, method="pissa_exact")
    assert len(count) == 2


def test_where_it_lies_and_how_it_is_switched_off(store, monkeypatch, caplog):
    directory, count = store
    assert cache_directory() == directory
    monkeypatch.setenv("BALORA_CACHE", "off")
    assert cache_directory() is None
    for _ in range(2):
        ba_lora(tiny_llama(), targets=["q_proj"])
    assert len(count) == 4 and not directory.exists()
    monkeypatch.delenv("BALORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_directory()) == "/somewhere/balora_plugin/starts"
    monkeypatch.setenv("BALORA_CACHE", "/proc/nowhere")  # cannot be written
    with caplog.at_level(logging.WARNING):
        ba_lora(tiny_llama(), targets=["q_proj"])
    assert caplog.text.count("BALORA_CACHE") == 1
    assert len(count) == 6


def beyond_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("BALORA_CACHE", str(tmp_path / "file"))


def of_a_name_too_long(tmp_path, monkeypatch):
    monkeypatch.setenv("BALORA_CACHE", str(tmp_path / ("x" * 300)))


def of_an_unknown_user(tmp_path, monkeypatch):
    monkeypatch.setenv("BALORA_CACHE", "~nobody_of_this_name/cache")


def without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("BALORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: Path("~no_such_user").expanduser())


def not_readable(tmp_path, monkeypatch):
    """As it is to another user than root, who runs tests in containers."""
    kept, original = tmp_path / "starts", Path.is_file

    def is_file(path):
        if kept in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    kept.mkdir()
    monkeypatch.setattr(Path, "is_file", is_file)


@pytest.mark.parametrize("place", [beyond_a_file, of_a_name_too_long, of_an_unknown_user, without_a_home, not_readable])
def test_a_run_goes_on_without_a_directory_and_says_so_once(place, store, tmp_path, monkeypatch, caplog, ids):
    _, count = store
    place(tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model = ba_lora(tiny_llama(), targets=["q_proj"])
    assert len(count) == 4
    assert caplog.text.count("BALORA_CACHE to a directory") == 1
    assert torch.equal(logits(model.eval(), ids), logits(tiny_llama().eval(), ids))


def test_files_are_believed_only_if_they_are_this_weights_triples(store):
    """Whoever wrote them: whole files with a hash that fits, of the right shape."""
    directory, count = store
    torch.manual_seed(0)
    weight, other = torch.randn(12, 8), torch.randn(12, 8)
    expected = StartCache(directory).factors(weight, 2, 1.0, method="pissa_exact")
    (path,) = directory.iterdir()
    foreign = disk_cache.pissa_factors(other, 2, 1.0)
    wrong = {
        "another weight's": foreign,
        "not finite": (expected[0] / 0, expected[1]),
        "of another dtype": tuple(x.double() for x in expected),
        "of another shape": (expected[0][:1], expected[1][:, :1]),
    }
    for what, (a, b) in wrong.items():
        tensors = {"A0": a.contiguous(), "B0": b.contiguous()}
        save_file(tensors, path, {"sha256": disk_cache._digest(tensors)})
        made = len(count)
        again = StartCache(directory).factors(weight, 2, 1.0, method="pissa_exact")
        assert all(torch.equal(x, y) for x, y in zip(again, expected, strict=True)), what
        assert len(count) == made + 1, what
        StartCache(directory).factors(weight, 2, 1.0, method="pissa_exact")  # written anew
        assert len(count) == made + 1, what


def test_tiny_matrices_are_not_kept_and_those_of_small_models_are(store, monkeypatch):
    directory, _ = store
    monkeypatch.setattr(disk_cache, "SMALLEST", 2**14)  # as it is
    ba_lora(tiny_llama())
    assert not directory.exists()
    StartCache(directory).factors(torch.randn(192, 576), 4, 1.0, method="pissa")  # of a model of 135M parameters
    assert len(list(directory.iterdir())) == 1


def test_the_least_recently_used_go_first(store, monkeypatch):
    directory, count = store
    weights = [torch.full((6, 6), float(i)) + torch.eye(6) for i in range(3)]
    for i, weight in enumerate(weights):
        StartCache(directory).factors(weight, 2, 1.0, method="pissa_exact")
        newest = max(directory.iterdir(), key=lambda path: path.stat().st_ctime_ns)
        os.utime(newest, (i + 1, i + 1))
    StartCache(directory).factors(weights[0], 2, 1.0, method="pissa_exact")  # read: now the youngest
    size = next(directory.iterdir()).stat().st_size
    monkeypatch.setattr(disk_cache, "LARGEST", 2 * size)
    cache = StartCache(directory)
    cache.computed = 1
    cache.prune()
    assert len(list(directory.iterdir())) == 2
    made = len(count)
    StartCache(directory).factors(weights[0], 2, 1.0, method="pissa_exact")
    assert len(count) == made
    StartCache(directory).factors(weights[1], 2, 1.0, method="pissa_exact")
    assert len(count) == made + 1


def test_a_directory_that_belongs_to_another_user_is_read_and_left_alone(store, monkeypatch):
    directory, count = store
    weight = torch.randn(12, 8)
    expected = StartCache(directory).factors(weight, 2, 1.0, method="pissa_exact")

    def refuse(*args, **kwargs):
        raise PermissionError(1, "not the owner")

    monkeypatch.setattr(os, "utime", refuse)
    cache = StartCache(directory)
    found = cache.factors(weight, 2, 1.0, method="pissa_exact")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (cache.found, len(count)) == (1, 1)
    monkeypatch.setattr(disk_cache, "LARGEST", 0)
    monkeypatch.setattr(Path, "unlink", refuse)
    cache.computed = 1
    cache.prune()
    assert len(list(directory.iterdir())) == 1


def test_what_a_killed_run_left_half_written_goes_with_time(store):
    directory, _ = store
    cache = StartCache(directory)
    cache.factors(torch.randn(12, 8), 2, 1.0, method="pissa_exact")
    for name in ("old.1.tmp", "young.2.tmp"):
        (directory / name).write_bytes(b"half")
    os.utime(directory / "old.1.tmp", (1, 1))
    cache.prune()
    assert [path.name for path in directory.glob("*.tmp")] == ["young.2.tmp"]
    assert len(list(directory.glob("*.safetensors"))) == 1


def _start(rank, case):
    os.environ["BALORA_CACHE"] = "off"
    count = []
    original = disk_cache.pissa_factors
    disk_cache.pissa_factors = lambda weight, *args, **kw: count.append(1) or original(weight, *args, **kw)
    model = tiny_llama()
    error = None
    if case == "nan" and rank == 1:
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    if case == "meta" and rank == 1:
        model = model.to("meta")
    try:
        model = ba_lora(model)
    except ValueError as problem:
        error = str(problem)
    kept = {name: p for name, p in factors(model).items() if p.device.type != "meta"} if error is None else {}
    return {"count": len(count), "error": error, "factors": kept}


def test_each_matrix_is_factorised_once_over_the_ranks(tmp_path):
    both = on_two_ranks(tmp_path, _start, "plain")
    expected = factors(ba_lora(tiny_llama()))
    assert [found["count"] for found in both] == [7, 7]  # 14 layers
    for found in both:
        assert found["factors"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found["factors"][name].abs(), value.abs(), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, both[1]["factors"][name]) for name, value in both[0]["factors"].items())


@pytest.mark.slow
def test_an_error_of_one_rank_is_everybodys(tmp_path):
    both = on_two_ranks(tmp_path, _start, "nan")
    assert both[0]["error"] == both[1]["error"]
    assert "layers.1.mlp.down_proj" in both[0]["error"] and "NaN" in both[0]["error"]


@pytest.mark.slow
def test_ranks_without_weights_leave_the_work_to_the_others(tmp_path):
    both = on_two_ranks(tmp_path, _start, "meta")
    assert [found["count"] for found in both] == [14, 0]
