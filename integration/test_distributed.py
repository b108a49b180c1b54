"""Two data-parallel ranks (gloo) give one process's token terms on the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def step(directory, host, ranks, batch, accumulation):
    directory.mkdir()
    worker = ["integration/ddp_worker.py", str(directory / "result.pt"), str(batch), str(accumulation), str(directory)]
    worker.append(host)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    env["ACCELERATE_USE_CPU"] = "true"  # Axolotl looks for ranks while it is imported
    done = subprocess.run(
        [*launcher, *worker], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(directory / "result.pt", weights_only=False), load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("host", ["trl", "axolotl", pytest.param("compiled", marks=pytest.mark.slow)])
def test_ranks_do_not_change_the_gradients(host, tmp_path):
    if host == "axolotl":
        pytest.importorskip("axolotl")
    alone, alone_adapter = step(tmp_path / "alone", "trl" if host == "compiled" else host, 1, 8, 1)
    both, both_adapter = step(tmp_path / "both", host, 2, 2, 2)
    scale = max(g.abs().max() for g in alone["gradients"].values())
    assert alone["gradients"].keys() == both["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        assert (gradient - both["gradients"][name]).abs().max() < 1e-5 * scale, name
    for ours, theirs in zip(both["logs"], alone["logs"], strict=True):
        for key in ("loss", "balora/task", "balora/consistency", "balora/diversity", "balora/loss"):
            if key in theirs:
                assert abs(ours[key] - theirs[key]) < 1e-5 * max(abs(theirs[key]), 1e-3), key
    assert abs(both["eval"]["eval_balora/task"] - alone["eval"]["eval_balora/task"]) < 1e-5
    for key, value in alone_adapter.items():
        torch.testing.assert_close(both_adapter[key], value, rtol=0, atol=1e-5)
