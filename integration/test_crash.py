"""A run killed by SIGKILL, inside a step or inside any write, resumes to the uninterrupted run, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from balora_plugin.checkpoint import integrity

from .ranks import run_worker
from .workers.crash import KILL_AT, MOMENTS, STEPS, trainer

HOSTS = ("trl", "transformers")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The directories of all killed runs."""
    directory = tmp_path_factory.mktemp("killed")
    done = run_worker("crash.py", str(directory))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return directory


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed runs
    found = {}
    for host in HOSTS:
        made = trainer(host, tmp_path_factory.mktemp(host))
        made.train()
        found[host] = made
    yield found
    torch.set_num_threads(threads)


def losses(made):
    keys = ("loss", "grad_norm", "learning_rate", "balora/task", "balora/consistency", "balora/loss", "step")
    return [{key: row.get(key) for key in keys} for row in made.state.log_history if "loss" in row]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_resumes_to_the_uninterrupted_one(host, moment, killed, uninterrupted):
    directory = killed / f"{host}-{moment}"
    out = directory / "out"
    newest, before = out / f"checkpoint-{KILL_AT}", out / f"checkpoint-{KILL_AT - 1}"
    made = trainer(host, directory)
    if moment == "in_step":
        assert not newest.exists()
        made.train(resume_from_checkpoint=True)
    else:
        assert newest.exists()
        with pytest.raises(ValueError, match="cannot resume") as caught:
            made.train(resume_from_checkpoint=True)
        assert str(before) in str(caught.value)
        assert integrity.last_whole(str(out)) == str(before)
        made = trainer(host, directory)
        made.train(resume_from_checkpoint=str(before))  # over the one that was cut short
    expected = uninterrupted[host]
    assert made.state.global_step == STEPS
    assert losses(made) == losses(expected)
    theirs = load_file(Path(expected.args.output_dir, f"checkpoint-{STEPS}", "adapter_model.safetensors"))
    ours = load_file(out / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len({os.stat(path).st_ino for path in out.glob("checkpoint-*/ba_lora_init.safetensors")}) == 1


def test_a_checkpoint_without_its_optimizer_is_not_resumed(tmp_path):
    made = trainer("transformers", tmp_path, save_only_model=True)
    made.train()
    with pytest.raises(ValueError, match="save_only_model"):
        trainer("transformers", tmp_path).train(resume_from_checkpoint=True)
