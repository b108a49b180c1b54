"""push_to_hub during training: what is uploaded, and what a killed copy leaves, is a whole adapter or none."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import RepoUrl
from models import tiny_llama
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from balora_plugin import BaLoraConfig, BaLoraModel, BaLoraTrainer
from balora_plugin.checkpoint.integrity import is_finished
from balora_plugin.checkpoint.manifest import read_manifest

from .workers.crash import trainer

PUSHING = {"push_to_hub": True, "hub_model_id": "somebody/adapter", "max_steps": 2, "hub_always_push": True}
WEIGHTS, SETTINGS = "adapter_model.safetensors", "ba_lora.json"


class Killed(BaseException):
    pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The folders that were uploaded, each as it was at that moment: [(path in the repository, folder)]."""
    uploads = []

    def upload_folder(self, *, folder_path, path_in_repo=None, ignore_patterns=None, run_as_future=False, **kwargs):
        copy = tmp_path / "uploads" / str(len(uploads))
        shutil.copytree(folder_path, copy, ignore=shutil.ignore_patterns(*(ignore_patterns or ())))
        uploads.append((path_in_repo, copy))
        done = Future()
        done.set_result(None)
        return done if run_as_future else None

    def create_repo(self, name, **kwargs):
        return RepoUrl(f"https://huggingface.co/{name}")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    return uploads


def same(directory, other):
    """Whether two directories hold the same whole adapter of ours."""
    names = (WEIGHTS, SETTINGS, "ba_lora_init.safetensors", "ba_lora_probe.safetensors", "adapter_config.json")
    return is_finished(str(directory)) and all(
        (Path(directory) / name).read_bytes() == (Path(other) / name).read_bytes() for name in names
    )


@pytest.mark.parametrize(("host", "strategy"), [("trl", "all_checkpoints"), ("transformers", "every_save")])
def test_every_upload_is_a_whole_adapter_in_a_second_run_too(host, strategy, hub, tmp_path):
    for seed in (3, 4):  # both into one directory
        made = trainer(host, tmp_path, hub_strategy=strategy, seed=seed, **PUSHING)
        made.train()
        roots = [folder for where, folder in hub if where is None]
        steps = [folder for where, folder in hub if where is not None]
        assert len(roots) == 2 and len(steps) == (2 if strategy == "all_checkpoints" else 0)
        for step, root in enumerate(roots, start=1):
            assert same(root, tmp_path / "out" / f"checkpoint-{step}")
            assert not [name for name in os.listdir(root) if name.endswith((".tmp", ".lock"))]
        assert not same(roots[0], roots[1])
        assert all(read_manifest(folder).sha256 for folder in steps)  # sealed before it is pushed
        hub.clear()
        shutil.rmtree(tmp_path / "uploads")
    made.push_to_hub()
    ((_, last),) = hub
    assert is_finished(str(last)) and (last / "README.md").exists()
    loaded = BaLoraModel.from_pretrained(tiny_llama(), last, is_trainable=True)
    ours = dict(made.model.named_parameters())
    assert all(torch.equal(p, ours[name]) for name, p in loaded.named_parameters() if "frozen_" in name)
    assert all(torch.equal(p, ours[name]) for name, p in loaded.named_parameters() if p.requires_grad)


def test_at_the_end_alone_nothing_is_pushed_before(hub, tmp_path):
    made = trainer("transformers", tmp_path, hub_strategy="end", **PUSHING)
    made.train()
    assert not hub
    made.save_model()
    assert [is_finished(str(folder)) for _, folder in hub] == [True]


@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
def test_killed_while_the_host_copies_leaves_nothing_that_loads_wrongly(name, hub, tmp_path, monkeypatch):
    trainer("transformers", tmp_path, **PUSHING).train()  # a whole one of an earlier run
    copy = shutil.copy

    def dying(source, target, **kwargs):
        copy(source, target, **kwargs)
        if Path(source).name == name:
            content = Path(target).read_bytes()
            Path(target).write_bytes(content[: len(content) // 2])
            raise Killed

    made = trainer("transformers", tmp_path, seed=4, **PUSHING)
    monkeypatch.setattr(shutil, "copy", dying)
    with pytest.raises(Killed):
        made.train()
    with pytest.raises((ValueError, OSError, SafetensorError)):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    whole = tmp_path / "out" / "checkpoint-1"  # nothing was lost
    expected = BaLoraModel.from_pretrained(tiny_llama(), whole).state_dict()
    if name == WEIGHTS:
        with pytest.raises(ValueError, match=f"{WEIGHTS} is not the file that was saved"):
            BaLoraModel.from_pretrained(tiny_llama(), tmp_path / "out")
    else:  # our own reader takes the settings from ba_lora.json
        found = BaLoraModel.from_pretrained(tiny_llama(), tmp_path / "out").state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_push_that_is_going_on_is_not_written_into(hub, tmp_path):
    """hub_always_push does not wait for the upload before, which reads the output directory all the while."""
    made = trainer("transformers", tmp_path, **PUSHING)
    unfinished, seen, push = Future(), [], made._push_from_checkpoint

    class Slow:
        is_done = staticmethod(unfinished.done)

        @staticmethod
        def wait_until_done():
            seen.append((tmp_path / "out" / SETTINGS).read_bytes())
            unfinished.set_result(None)

    def pushing(folder):
        if Path(folder).name == "checkpoint-2":
            made.push_in_progress = Slow
        push(folder)

    made._push_from_checkpoint = pushing
    made.train()
    assert unfinished.done()
    assert seen == [(tmp_path / "out" / "checkpoint-1" / SETTINGS).read_bytes()]


def test_a_plain_lora_with_terms_leaves_no_settings_of_an_adapter_before_it(hub, tmp_path):
    made = trainer("transformers", tmp_path, **PUSHING)
    made.train()
    plain = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    BaLoraTrainer(
        model=tiny_llama(),
        args=made.args,
        train_dataset=made.train_dataset,
        data_collator=made.data_collator,
        peft_config=plain,
        regularizers=made.ba_lora,
    ).train()
    _, root = hub[-1]
    assert not [name for name in os.listdir(root) if name.startswith("ba_lora") and name != "ba_lora_cost.json"]
    theirs = load_file(tmp_path / "out" / "checkpoint-2" / WEIGHTS)
    assert load_file(root / WEIGHTS).keys() == theirs.keys()
    with pytest.raises(ValueError, match=r"holds no ba_lora\.json"):
        BaLoraConfig.from_pretrained(root)
