"""Two data-parallel ranks (gloo) give one process's token terms on the same global batch."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from .ranks import run_worker

KEYS = ("loss", "balora/task", "balora/consistency", "balora/diversity", "balora/loss", "balora/anchor_consistency")


def step(directory, host, ranks, batch, accumulation):
    directory.mkdir()
    arguments = [str(directory / "result.pt"), str(batch), str(accumulation), str(directory), host]
    done = run_worker("ddp.py", *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(directory / "result.pt", weights_only=False), load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("host", ["trl", "axolotl", pytest.param("compiled", marks=pytest.mark.long)])
def test_ranks_do_not_change_the_gradients(host, tmp_path):
    if host == "axolotl":
        pytest.importorskip("axolotl")
    alone, alone_adapter = step(tmp_path / "alone", "trl" if host == "compiled" else host, 1, 8, 1)
    both, both_adapter = step(tmp_path / "both", host, 2, 2, 2)
    assert both["graphs"] in ((2, 3, 4) if host == "compiled" else (0,))  # teacher and student, one length or all
    scale = max(g.abs().max() for g in alone["gradients"].values())
    assert alone["gradients"].keys() == both["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        assert (gradient - both["gradients"][name]).abs().max() < 1e-5 * scale, name
    for ours, theirs in zip(both["logs"], alone["logs"], strict=True):
        for key in KEYS:
            if key in theirs:  # of the first step the consistency is rounding alone
                assert abs(ours[key] - theirs[key]) < 1e-5 * max(abs(theirs[key]), 1e-2), key
    for key in ("eval_balora/task", "eval_balora/anchor_consistency"):
        assert abs(both["eval"][key] - alone["eval"][key]) < 1e-5, key
    drift, theirs = (result["weights"]["drift_target"] for result in (both, alone))
    assert theirs["smoothed"][0] > 1e-6
    assert drift["smoothed"] == pytest.approx(theirs["smoothed"], rel=1e-4)  # over all ranks and micro-batches
    for key, value in alone_adapter.items():
        torch.testing.assert_close(both_adapter[key], value, rtol=0, atol=1e-5)
