"""Directories that a crash cut short; A0 shared between checkpoints; what is not finite is not saved."""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
from helpers import ba_lora, fresh, logits, train
from models import tiny_llama
from safetensors.torch import load_file, save_file

from balora_plugin import BaLoraConfig, BaLoraModel, get_ba_lora_model
from balora_plugin.checkpoint import integrity
from balora_plugin.checkpoint.names import INIT_FILE, SETTINGS_FILE, WEIGHTS_FILE
from balora_plugin.checkpoint.settings import file_digest
from balora_plugin.checkpoint.weights import largest_saved

pytestmark = pytest.mark.hosts


def checkpoint(model, directory):
    """What a Trainer leaves, in its order."""
    model.save_pretrained(directory)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(1000)}, directory / name)
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    return str(directory)


@pytest.fixture
def run(llama, tmp_path, ids):
    """A run's output directory with checkpoint-1, -2 and -3, and its model."""
    model = ba_lora(llama)
    for step in (1, 2, 3):
        train(model, ids, steps=1)
        checkpoint(model, tmp_path / f"checkpoint-{step}")
    return model, tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CUTS = {
    "no_directory": (shutil.rmtree, "no such directory"),
    "no_state": (lambda d: (d / "trainer_state.json").unlink(), "trainer_state.json"),
    "half_state": (lambda d: truncate(d / "trainer_state.json"), "trainer_state.json is cut short"),
    "half_optimizer": (lambda d: truncate(d / "optimizer.pt"), "optimizer.pt is cut short"),
    "no_optimizer": (lambda d: (d / "optimizer.pt").unlink(), "save_only_model=True"),
    "half_scheduler": (lambda d: truncate(d / "scheduler.pt"), "scheduler.pt is cut short"),
    "half_random_state": (lambda d: truncate(d / "rng_state.pth"), "rng_state.pth is cut short"),
    "no_random_state": (lambda d: (d / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "no_settings": (lambda d: (d / SETTINGS_FILE).unlink(), SETTINGS_FILE),
    "half_settings": (lambda d: truncate(d / SETTINGS_FILE), "not JSON"),
    "half_weights": (lambda d: truncate(d / WEIGHTS_FILE), f"{WEIGHTS_FILE} is not the file"),
    "no_weights": (lambda d: (d / WEIGHTS_FILE).unlink(), f"{WEIGHTS_FILE} is missing"),
    "no_init": (lambda d: (d / INIT_FILE).unlink(), f"{INIT_FILE} is missing"),
    "no_config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json is missing"),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_checkpoint_cut_short_is_refused_and_the_last_whole_one_named(cut, run):
    _, directory = run
    last = directory / "checkpoint-3"
    assert integrity.checkpoint_flaw(str(last)) is None
    integrity.check_whole(str(last))
    damage, words = CUTS[cut]
    damage(last)
    with pytest.raises(ValueError, match=words) as caught:
        integrity.check_whole(str(last))
    assert str(directory / "checkpoint-2") in str(caught.value)
    damage(directory / "checkpoint-2")
    with pytest.raises(ValueError, match="checkpoint-1") as caught:
        integrity.check_whole(str(last))
    damage(directory / "checkpoint-1")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        integrity.check_whole(str(last))


@pytest.mark.parametrize("start", ["pissa", True])
def test_a_damaged_adapter_names_the_last_whole_one(start, run):
    _, directory = run
    if start is True:  # an ordinary LoRA, loaded by PEFT
        for step in (2, 3):
            ba_lora(tiny_llama(), init_lora_weights=True).save_pretrained(directory / f"checkpoint-{step}")
    path = directory / "checkpoint-3" / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of one factor
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint-2"):
        BaLoraModel.from_pretrained(tiny_llama(), str(directory / "checkpoint-3"))


def test_an_adapter_of_another_name_is_looked_at_where_peft_saves_it(llama, tmp_path):
    config = BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"])
    model = get_ba_lora_model(llama, config, adapter_name="mine")
    model.add_adapter("second", config)
    for step in (1, 2):
        checkpoint(model, tmp_path / f"checkpoint-{step}")
    both, last = ("mine", "second"), str(tmp_path / "checkpoint-2")
    assert integrity.checkpoint_flaw(last, both) is None
    assert integrity.checkpoint_flaw(last) is not None  # it holds no adapter called default
    truncate(tmp_path / "checkpoint-2" / "second" / WEIGHTS_FILE)
    assert integrity.checkpoint_flaw(last, both[:1]) is None
    with pytest.raises(ValueError, match=r"'second'.*checkpoint-1"):
        integrity.check_whole(last, both)
    with pytest.raises(ValueError, match="checkpoint-1"):
        model.load_adapter(tmp_path / "checkpoint-2" / "second", "second")


def test_a_base_that_has_moved_may_be_edited_into_the_config(run):
    _, directory = run
    path = directory / "checkpoint-3" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "/elsewhere"}))
    assert integrity.checkpoint_flaw(str(directory / "checkpoint-3")) is None


def test_an_engines_own_checkpoint_may_lack_the_adapters_files(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    assert integrity.checkpoint_flaw(str(tmp_path)) is not None
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "optimizer_0").mkdir()
    assert integrity.checkpoint_flaw(str(tmp_path)) is None


def inodes(directory):
    return {os.stat(directory / f"checkpoint-{step}" / INIT_FILE).st_ino for step in (1, 2, 3)}


def test_a0_is_stored_once_over_all_checkpoints_of_a_run(run, ids):
    model, directory = run
    assert len(inodes(directory)) == 1
    shutil.rmtree(directory / "checkpoint-1")  # save_total_limit
    expected = logits(model.eval(), ids)
    again = BaLoraModel.from_pretrained(tiny_llama(), directory / "checkpoint-3", is_trainable=True)
    assert torch.equal(logits(again.eval(), ids), expected)
    checkpoint(again, directory / "checkpoint-4")  # a resumed run shares on
    assert os.path.samefile(directory / "checkpoint-4" / INIT_FILE, directory / "checkpoint-3" / INIT_FILE)
    checkpoint(again, directory / "checkpoint-4")  # saved over itself
    assert integrity.checkpoint_flaw(str(directory / "checkpoint-4")) is None
    assert not list(directory.glob("*/*.tmp"))


def test_another_start_or_dtype_is_written_anew_and_harms_no_linked_file(run):
    model, directory = run
    before = (directory / "checkpoint-1" / INIT_FILE).read_bytes()
    for name, p in model.named_parameters():
        if "frozen_A" in name:
            p.data.neg_()
    model.save_pretrained(directory / "checkpoint-3")  # over a file that is linked three times
    assert (directory / "checkpoint-1" / INIT_FILE).read_bytes() == before
    assert len(inodes(directory)) == 2
    a0 = load_file(directory / "checkpoint-3" / INIT_FILE)
    assert torch.equal(next(iter(a0.values())), -load_file(directory / "checkpoint-1" / INIT_FILE)[next(iter(a0))])
    fresh(model).bfloat16().save_pretrained(directory / "checkpoint-2")
    assert load_file(directory / "checkpoint-2" / INIT_FILE).popitem()[1].dtype == torch.bfloat16
    assert load_file(directory / "checkpoint-1" / INIT_FILE).popitem()[1].dtype == torch.float32


def test_without_links_it_is_copied(run, monkeypatch):
    model, directory = run

    def refuse(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint(model, directory / "checkpoint-4")
    assert integrity.checkpoint_flaw(str(directory / "checkpoint-4")) is None
    assert not os.path.samefile(directory / "checkpoint-4" / INIT_FILE, directory / "checkpoint-3" / INIT_FILE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_not_saved(run, value):
    model, directory = run
    before = {p.name: p.read_bytes() for p in (directory / "checkpoint-3").iterdir()}
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = value
    with pytest.raises(FloatingPointError, match=r"lora_B.*holds NaN or inf"):
        model.save_pretrained(directory / "checkpoint-3")
    assert {p.name: p.read_bytes() for p in (directory / "checkpoint-3").iterdir()} == before


def test_every_rank_of_the_node_has_its_random_state(run, monkeypatch):
    model, directory = run
    last = directory / "checkpoint-3"
    monkeypatch.setattr("balora_plugin.checkpoint.settings.ranks_here", lambda: [2, 3])
    model.save_pretrained(last)
    torch.save({}, last / "rng_state_2.pth")
    assert "rng_state_3.pth is missing" in (integrity.checkpoint_flaw(str(last)) or "")
    torch.save({}, last / "rng_state_3.pth")
    assert integrity.checkpoint_flaw(str(last)) is None
    integrity.begin_save(str(last), rank=3, processes=4, first=False)  # another rank may have written its own
    assert (last / "rng_state_2.pth").exists() and not (last / "rng_state_3.pth").exists()


def test_a_save_over_an_older_checkpoint_takes_its_wholeness_first(run):
    _, directory = run
    integrity.begin_save(str(directory / "checkpoint-3"))
    assert "trainer_state.json" in (integrity.checkpoint_flaw(str(directory / "checkpoint-3")) or "")
    assert not (directory / "checkpoint-3" / "optimizer.pt").exists()  # save_only_model would not replace it
    (directory / "trainer_state.json").write_text("{}")
    integrity.begin_save(str(directory))  # the run's own state is no checkpoint's
    assert (directory / "trainer_state.json").exists()
    integrity.begin_save(str(directory / "checkpoint-9"))


def without_manifest(run, change):
    """checkpoint-3 of `run`, of an earlier release, with its weights changed and their hash with them."""
    _, directory = run
    path = directory / "checkpoint-3" / WEIGHTS_FILE
    tensors = {key: change(value) for key, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    settings = json.loads((path.parent / SETTINGS_FILE).read_text())
    settings["sha256"][WEIGHTS_FILE] = file_digest(path)
    (path.parent / SETTINGS_FILE).write_text(json.dumps(settings))
    assert integrity.checkpoint_flaw(str(path.parent)) is None
    return integrity.recommended(str(directory))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e30])
def test_a_checkpoint_without_a_manifest_is_looked_at(run, dtype, value):
    def last(tensor):
        changed = tensor.to(dtype)
        changed.view(-1)[-1] = value
        return changed

    _, directory = run
    found = without_manifest(run, last)
    assert found.path == str(directory / "checkpoint-2") and not found.unseen
    assert "checkpoint-3 is whole, but holds weights beyond 65504 (or NaN)" in found.in_words()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_its_largest_value_is_the_one_that_torch_finds(run, dtype):
    _, directory = run
    found = without_manifest(run, lambda tensor: tensor.to(dtype))
    assert found == integrity.Recommended(str(directory / "checkpoint-3"), ())
    expected = max(t.abs().max().item() for t in load_file(directory / "checkpoint-3" / WEIGHTS_FILE).values())
    assert largest_saved(str(directory / "checkpoint-3"), ["default"]) == expected


def test_weights_that_cannot_be_looked_at_are_said(tmp_path):
    path = tmp_path / "checkpoint-1"
    path.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        torch.save({}, path / name)
    (path / "trainer_state.json").write_text("{}")
    found = integrity.recommended(str(tmp_path), ())
    assert found.path == str(path) and found.in_words() == f" (The weights of {path} were not checked.)"
    (path / "model.safetensors").write_bytes(b"12345678half")
    assert integrity.recommended(str(tmp_path), ()).passed_over == (str(path),)
