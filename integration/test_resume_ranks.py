"""Two gloo ranks under DDP, FSDP, DeepSpeed: awkward batches give one process's numbers, a resumed run is the run."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from .ranks import run_worker

DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed (it is built from source; see CONTRIBUTING.md)"
)
RANKS = [
    "ddp",
    pytest.param("fsdp2", marks=pytest.mark.slow),
    pytest.param("fsdp1", marks=pytest.mark.slow),
    pytest.param("zero2", marks=[pytest.mark.slow, DEEPSPEED]),
    pytest.param("zero3", marks=[pytest.mark.slow, DEEPSPEED]),
]


def work(directory, kind):
    directory.mkdir()
    ranks = 1 if kind == "alone" else 2
    done = run_worker("resume.py", str(directory), kind, ranks=ranks, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return torch.load(directory / "result.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return work(tmp_path_factory.mktemp("alone") / "run", "alone")


@pytest.mark.parametrize("kind", RANKS)
def test_two_ranks_train_and_resume_as_one_process(kind, alone, tmp_path):
    """First step: one rank counts no token. Second, and the evaluation's last batch: three samples for two ranks."""
    found = work(tmp_path / "run", kind)
    for expected, gradients in zip(alone["gradients"], found["gradients"], strict=True):
        assert expected.keys() == gradients.keys()
        scale = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            assert (gradient - gradients[name]).abs().max() < 1e-5 * scale, name
    for theirs, ours in zip(alone["logs"], found["logs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    terms = {key: value for key, value in alone["eval"].items() if "balora" in key}
    assert len(terms) == 5
    assert {key: found["eval"][key] for key in terms} == pytest.approx(terms, rel=1e-5, abs=1e-6)  # nothing twice
    assert found["eval"]["eval_rows"] == 7

    # the resumed run starts on an SVD with other signs: A0 and B0 are the checkpoint's, whoever loaded the rest
    resumed, whole = ([row for row in found[name] if "loss" in row] for name in ("resumed", "whole"))
    assert resumed == whole != []
    files = ("whole/checkpoint-4", "resumed/checkpoint-4", "whole/checkpoint-2", "best")
    whole, resumed, second, best = (load_file(tmp_path / "run" / name / "adapter_model.safetensors") for name in files)
    assert whole.keys() == resumed.keys() == second.keys() == best.keys()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
        assert torch.equal(best[key], second[key]), key  # load_best_model_at_end
    assert any(not torch.equal(second[key], value) for key, value in whole.items())
