"""`axolotl train` killed by SIGKILL, inside a step or inside a save, resumes to the uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("axolotl")

from .axolotl_run import history, run
from .ranks import ROOT
from .workers.crash import KILL_AT, STEPS

MOMENTS = ("in_step", "in_weights", "in_optimizer", "in_state", "before_seal")
RUN = {
    "max_steps": STEPS,
    "num_epochs": 9,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.1,
    "lr_scheduler": "cosine",
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
}
TERMS = {"preset": "iclr2026", "lambda_consistency": 0.5, "teacher_interval": 2}


@pytest.fixture
def one_thread():
    """As the killed runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_run_killed_inside_a_step_or_a_save_resumes_to_the_uninterrupted_one(written, tmp_path, one_thread, caplog):
    def yaml(moment, name, **changes):
        return written(f"{moment}-{name}.yml", **RUN, ba_lora=TERMS, output_dir=str(tmp_path / moment), **changes)

    whole = run(yaml("whole", "first"))
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    killed = [text for moment in MOMENTS for text in (moment, str(yaml(moment, "first")))]
    done = subprocess.run(
        [sys.executable, "-m", "integration.workers.axolotl_crash", *killed],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        cwd=ROOT,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    for moment in MOMENTS:
        newest, before = (tmp_path / moment / f"checkpoint-{KILL_AT - n}" for n in (0, 1))
        assert before.exists() and newest.exists() == (moment != "in_step"), moment
        if moment == "in_state":  # named by hand
            with pytest.raises(ValueError, match="cannot resume") as caught:
                run(yaml(moment, "cut", resume_from_checkpoint=str(newest)))
            assert str(before) in str(caught.value)
        caplog.clear()
        with caplog.at_level("WARNING", logger="axolotl.balora_plugin"):
            resumed = run(yaml(moment, "automatic", auto_resume_from_checkpoints=True))
        said = [line for line in caplog.messages if str(newest) in line and str(before) in line]
        assert len(said) == (moment != "in_step"), moment
        assert resumed.state.global_step == STEPS
        for key in ("loss", "grad_norm", "learning_rate", "balora/task", "balora/consistency", "balora/loss"):
            assert history(resumed, key) == history(whole, key), (moment, key)
        found = load_file(tmp_path / moment / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), moment

    # a finished run that is resumed, and resumed again, does nothing
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "in_step").glob("checkpoint-*/*")}
    again = run(yaml("in_step", "again", auto_resume_from_checkpoints=True))
    assert again.state.global_step == STEPS and not history(again, "loss")[STEPS:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "in_step").glob("checkpoint-*/*")} == files
    found = load_file(tmp_path / "in_step" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.slow
def test_a_run_killed_in_its_first_save_begins_again(written, tmp_path, one_thread):
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoint-1" / "adapter_config.json").write_text("{")
    trained = run(written(max_steps=2, auto_resume_from_checkpoints=True, output_dir=str(out)))
    assert trained.state.global_step == 2 and len(history(trained, "loss")) == 2
