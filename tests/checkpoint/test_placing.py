"""An adapter copied over another: killed between any two steps, what is read is one of the two, whole, or nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ba_lora, logits, train
from models import tiny_llama
from peft import PeftModel

from balora_plugin import BaLoraModel
from balora_plugin.checkpoint.integrity import is_finished
from balora_plugin.checkpoint.names import CONFIG_FILE, INIT_FILE, SETTINGS_FILE, WEIGHTS_FILE
from balora_plugin.checkpoint.placing import place, retire, withdraw

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two saved adapters that differ in factors and scaling alone, with the function of each."""
    ids = torch.arange(12).reshape(1, 12)
    found = []
    for alpha, steps in ((4, 2), (16, 3)):
        model = ba_lora(tiny_llama(), lora_alpha=alpha, targets=["q_proj", "v_proj"])
        train(model, ids, steps=steps)
        directory = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(directory)
        found.append((directory, logits(model.eval(), ids)))
    return ids, found


def killed_at(step, function):
    """Runs `function` in a fork that dies before its n-th change of a name; returns whether it died."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = step

    def counted(original):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return original(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (Path, "unlink"), (shutil, "copyfile")):
        setattr(owner, name, counted(getattr(owner, name)))
    try:
        function()
    finally:
        os._exit(0)


def test_killed_anywhere_what_loads_is_one_of_the_two(pair, tmp_path):
    ids, ((old, _), (new, _)) = pair
    expected = [function for _, function in pair[1]]
    seen = set()
    for step in range(100):
        root = tmp_path / str(step)
        place(old, root, ["default"])
        died = killed_at(step, lambda root=root: place(new, root, ["default"]))
        for load in (PeftModel, BaLoraModel):
            try:
                model = load.from_pretrained(tiny_llama(), str(root))
            except (ValueError, OSError):
                seen.add((load, "none"))
                continue
            which = [torch.allclose(logits(model.eval(), ids), function, atol=1e-5) for function in expected]
            assert sum(which) == 1, (step, load)
            seen.add((load, which.index(True)))
        if not died:
            break
    assert seen == {(load, what) for load in (PeftModel, BaLoraModel) for what in (0, "none", 1)}
    assert is_finished(str(root)) and (root / SETTINGS_FILE).read_bytes() == (new / SETTINGS_FILE).read_bytes()


def test_what_a_killed_copy_has_left_is_gone_after_the_next_one(pair, tmp_path):
    _, ((old, _), _) = pair
    left = tmp_path / f"{WEIGHTS_FILE}.0123.tmp"
    left.write_bytes(b"half")
    place(old, tmp_path, ["default"])
    assert not left.exists() and is_finished(str(tmp_path))


def test_nothing_is_written_through_a_shared_a0(pair, tmp_path):
    _, ((old, _), (new, _)) = pair
    before = (old / INIT_FILE).read_bytes()
    place(old, tmp_path, ["default"])
    assert os.stat(tmp_path / INIT_FILE).st_ino == os.stat(old / INIT_FILE).st_ino
    place(new, tmp_path, ["default"])
    assert (old / INIT_FILE).read_bytes() == before


def test_adapters_of_other_names_stand_where_peft_puts_them(llama, tmp_path):
    model = ba_lora(llama, targets=["q_proj"])
    model.add_adapter("second", model.peft_config["default"])
    model.save_pretrained(tmp_path / "saved")
    place(tmp_path / "saved", tmp_path / "root", ["default", "second"])
    assert is_finished(str(tmp_path / "root")) and is_finished(str(tmp_path / "root" / "second"))


def test_a_save_over_an_adapter_takes_its_settings_away_first(pair, tmp_path, monkeypatch):
    _, ((old, _), _) = pair
    place(old, tmp_path, ["default"])
    model = ba_lora(tiny_llama(), targets=["q_proj", "v_proj"])
    monkeypatch.setattr("peft.peft_model.safe_save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter_config"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path))


def test_another_kind_of_adapter_is_left_alone(pair, tmp_path):
    _, ((old, _), _) = pair
    (tmp_path / CONFIG_FILE).write_text("{}")
    retire(tmp_path)
    assert (tmp_path / CONFIG_FILE).exists()
    place(old, tmp_path, ["default"])
    retire(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [WEIGHTS_FILE]
    withdraw(tmp_path)  # where there is none
