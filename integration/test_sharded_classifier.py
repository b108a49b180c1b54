"""Classifiers on two ranks, under FSDP2 or ZeRO: one process's numbers, resumed with the head of their teacher."""

from __future__ import annotations

import pytest
import torch
from classifiers import classifier
from peft import PeftModel
from safetensors.torch import load_file

from .ranks import run_worker
from .test_resume_ranks import DEEPSPEED

ADAPTER, HEAD = "adapter_model.safetensors", "ba_lora_head.safetensors"


def work(directory, kind):
    directory.mkdir()
    ranks = 1 if kind == "alone" else 2
    done = run_worker("sharded_classifier.py", str(directory), kind, ranks=ranks, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return torch.load(directory / "result.pt", weights_only=False)


def terms(row):
    return {key: value for key, value in row.items() if key == "loss" or "balora" in key}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone") / "run"
    return work(directory, "alone"), directory


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("zero2", marks=[pytest.mark.slow, DEEPSPEED]),
        pytest.param("zero3", marks=[pytest.mark.slow, DEEPSPEED]),
    ],
)
def test_a_sharded_classifier_is_the_whole_one_and_resumes(kind, alone, tmp_path):
    expected, reference = alone
    found = work(tmp_path / "run", kind)
    # DeepSpeed steps inside its backward pass, and its Adam counts the step in which the adapter has no gradient
    close = 1e-3 if kind.startswith("zero") else 1e-5
    pairs = [] if kind.startswith("zero") else zip(found["gradients"], expected["gradients"], strict=True)
    for step, (ours, theirs) in enumerate(pairs):
        counts = [[len(gradients) for gradients in run["gradients"]] for run in (found, expected)]
        assert theirs.keys() <= ours.keys(), (step, counts, found["logs"], expected["logs"])
        scale = max(gradient.abs().max() for gradient in theirs.values())
        for name, gradient in ours.items():
            assert (gradient - theirs.get(name, torch.zeros(()))).abs().max() < 1e-5 * scale, name
    rows = [[terms(row) for row in run["logs"] if "loss" in row] for run in (expected, found)]
    for theirs, ours in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=close, abs=close / 10)
    assert rows[1][1]["balora/consistency"] == 0  # the teacher has just got the student's head
    assert all(row["balora/consistency"] > 0 for row in rows[1][2:])
    for name in (ADAPTER, HEAD):
        files = [load_file(where / "final" / name) for where in (reference, tmp_path / "run")]
        assert files[0].keys() == files[1].keys()
        for key, value in files[0].items():
            torch.testing.assert_close(files[1][key], value, rtol=0, atol=close)

    # resumed under another random head: the teacher has that of the first run, bit for bit
    assert [terms(row) for row in found["resumed"] if "loss" in row] == rows[1]
    for name in (ADAPTER, HEAD):
        whole, resumed = (load_file(tmp_path / "run" / run / "checkpoint-4" / name) for run in ("whole", "resumed"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    stock = PeftModel.from_pretrained(classifier(), tmp_path / "run" / "final")
    assert stock.peft_config["default"].r == 4
