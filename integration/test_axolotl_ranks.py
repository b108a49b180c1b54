"""`axolotl train` on two ranks by its own launcher (torchrun; gloo, on a CPU) trains what one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("axolotl")

from axolotl.cli import train as axolotl_train
from axolotl.cli.config import load_cfg

from balora_plugin.hosts.axolotl.plugin import regularizers_of

from .axolotl_run import history, run
from .ranks import ROOT, free_port

RUN = {
    "max_steps": 4,
    "num_epochs": 9,
    "micro_batch_size": 2,
    "max_grad_norm": 0.0,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "curriculum_sampling": True,  # in the order of the file
    "save_strategy": "steps",
    "save_steps": 2,
}
PLUGINS = ["balora_plugin.BaLoraPlugin", "integration.axolotl_ranks.RanksPlugin"]


def launch(path):
    """Runs `axolotl train` on two ranks; returns what each of them noted."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "ACCELERATE_USE_CPU": "true"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])  # Axolotl calls torchrun by name
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "torchrun"]
    command += ["--", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    outputs = path.parent.glob("*-rank-*.json")
    return {int(p.stem[-1]): json.loads(p.read_text(encoding="utf-8")) for p in outputs}


@pytest.mark.slow
def test_two_ranks_train_save_and_resume_as_one_process(written, tmp_path):
    alone = run(written(**RUN, gradient_accumulation_steps=2, output_dir=str(tmp_path / "alone")))
    ranks = launch(written(**RUN, plugins=PLUGINS, output_dir=str(tmp_path / "both")))
    for key in ("loss", "balora/task", "balora/consistency", "balora/diversity", "balora/svd", "balora/loss"):
        found = torch.tensor([row[key] for row in ranks[0]["log"] if key in row])
        torch.testing.assert_close(found, torch.tensor(history(alone, key)), rtol=1e-5, atol=1e-6, msg=key)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "both"))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    assert ranks[0]["written"] == ["checkpoint-2", "checkpoint-4", "both"]
    assert ranks[1]["written"] == []

    settings = {**RUN, "plugins": PLUGINS, "output_dir": str(tmp_path / "resumed")}
    resumed = launch(written(**settings, resume_from_checkpoint=str(tmp_path / "both" / "checkpoint-2")))
    assert [row["loss"] for row in resumed[0]["log"] if "loss" in row] == [
        row["loss"] for row in ranks[0]["log"] if "loss" in row
    ]
    again = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in found.items())


RAY = {"use_ray": True, "ray_num_workers": 2, "resources_per_worker": {"GPU": 1}}


def test_ray_hands_its_workers_the_run_that_was_configured(written, monkeypatch):
    """Axolotl validates twice: in the driver, and what came of that again in each worker."""
    found = {}
    monkeypatch.setattr(axolotl_train, "do_train", lambda cfg, cli_args: found.update(cfg=cfg))
    terms = {"preset": "iclr2026", "lambda_svd": 0.4, "svd_top_k": 3}
    driver = load_cfg(str(written(**RAY, ba_lora=terms, lora_dropout=0.1)))
    axolotl_train.ray_train_func({"cfg": driver.to_dict(), "cli_args": None})
    worker = found["cfg"]
    assert worker.adapter == "ba_lora" and worker.use_ray and worker.ray_num_workers == 2
    assert (worker.lora_r, worker.lora_alpha, worker.lora_dropout) == (4, 4, 0.1)
    assert regularizers_of(worker) == regularizers_of(driver)
    assert regularizers_of(worker).lambda_svd == 0.4
    assert not any(worker[key] for key in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ba_lora": {"lambda_svdd": 1}}, "did you mean lambda_svd"),
        ({"relora": True}, "relora: true"),
    ],
)
def test_ray_starts_no_worker_with_a_wrong_yaml(changes, words, written):
    with pytest.raises(ValueError, match=words):
        load_cfg(str(written(**RAY, **changes)))
