"""Two ranks under FSDP1 or FSDP2 (gloo, on a CPU) give one process's loss and gradients, and save its adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_llama
from peft import PeftModel
from safetensors.torch import load_file

from .ranks import run_worker

ROOT = Path(__file__).parent.parent
LAYERS = "LlamaDecoderLayer"


def work(directory, kind, units=LAYERS, modules_to_save="", layers="", teacher_pass="shared"):
    """The worker's exit code and what it said."""
    directory.mkdir()
    ranks = 1 if kind == "alone" else 2
    done = run_worker("fsdp.py", str(directory), kind, units, modules_to_save, layers, teacher_pass, ranks=ranks)
    return done.returncode, done.stdout + done.stderr


def step(directory, *how):
    code, said = work(directory, *how)
    assert code == 0, said[-4000:]
    return torch.load(directory / "result.pt"), load_file(directory / "adapter_model.safetensors"), said


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, by what is trained beside the adapter."""
    results = {}

    def result(*what):
        if what not in results:
            results[what] = step(tmp_path_factory.mktemp("alone") / "run", "alone", LAYERS, *what)
        return results[what]

    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "units", "modules_to_save", "layers", "teacher_pass"),
    [
        ("fsdp1", LAYERS, "", "", "shared"),
        ("fsdp2", LAYERS, "", "", "shared"),
        ("fsdp2", LAYERS, "lm_head", "", "shared"),
        ("fsdp2", f"{LAYERS},OwnUnit", "", "", "shared"),  # the head a unit of its own: gathered for the terms
        ("fsdp2", f"{LAYERS},OwnUnit", "lm_head", "", "shared"),
        ("fsdp2", LAYERS, "", "2,3", "shared"),  # the two below are computed once for teacher and student
        pytest.param("fsdp1", LAYERS, "", "2,3", "shared", marks=pytest.mark.long),
        ("fsdp2", LAYERS, "", "", "by_layer"),
        pytest.param("fsdp1", LAYERS, "", "2,3", "by_layer", marks=pytest.mark.long),
    ],
)
def test_sharding_changes_nothing(kind, units, modules_to_save, layers, teacher_pass, alone, tmp_path):
    one, one_adapter, _ = alone(modules_to_save, layers)
    two, two_adapter, said = step(tmp_path / "two", kind, units, modules_to_save, layers, teacher_pass)
    if layers:
        assert (one["shared"], two["shared"]) == ((2, 3, ""), (2, 1, ""))  # all micro-batches but the first
    assert two["by_layer"] == ((1, "") if teacher_pass == "by_layer" else None)
    assert two["wrapped"].startswith("FullySharded" if kind == "fsdp1" else "FSDP")
    assert "returned a view tensor" not in said
    assert one["gradients"].keys() == two["gradients"].keys()
    scale = max(g.abs().max() for g in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        assert (gradient - two["gradients"][name]).abs().max() < 1e-5 * scale, name
    for ours, theirs in zip(two["logs"], one["logs"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert abs(ours[key] - value) < 1e-5 * max(abs(value), 1e-3), key
    assert two["factors"] == one["factors"] == (0 if modules_to_save else 1)  # of a frozen head, once a run
    assert one_adapter.keys() == two_adapter.keys()
    for key, value in one_adapter.items():
        torch.testing.assert_close(two_adapter[key], value, rtol=0, atol=1e-5)
    stock = PeftModel.from_pretrained(tiny_llama(num_hidden_layers=4 if layers else 2), tmp_path / "two")
    assert stock.peft_config["default"].r == 8


@pytest.mark.slow
def test_a_training_head_that_fsdp1_shards_on_its_own_is_refused(tmp_path):
    """PEFT's policy makes every layer that trains a unit of its own: FSDP1 gives its weight to its forward alone."""
    code, said = work(tmp_path / "run", "fsdp1", LAYERS, "lm_head")
    assert code != 0
    assert "use fsdp_version: 2" in said


@pytest.mark.parametrize(("kind", "works"), [("FULL", True), ("SHARDED", True), ("LOCAL", False)])
def test_the_way_to_save_that_no_run_resumes_from_is_refused(kind, works):
    from types import SimpleNamespace

    from torch.distributed.fsdp import StateDictType

    from balora_plugin.training.checks.arguments import check_saving

    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(state_dict_type=getattr(StateDictType, f"{kind}_STATE_DICT")))
    if works:
        check_saving(SimpleNamespace(state=state))
        check_saving(SimpleNamespace(state=SimpleNamespace()))
    else:
        with pytest.raises(ValueError, match=f"fsdp_state_dict_type={kind}_STATE_DICT.*: SHARDED_STATE_DICT"):
            check_saving(SimpleNamespace(state=state))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_example_launch_configs_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "example_configs" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[name]
    assert config.num_processes == 8


@pytest.mark.parametrize(
    ("kind", "layers", "saved"),
    [
        ("fsdp2", "", ""),
        pytest.param("fsdp2", "2,3", "lm_head", marks=pytest.mark.slow),
        pytest.param("ddp", "2,3", "", marks=pytest.mark.slow),
        pytest.param("fsdp1", "", "", marks=pytest.mark.long),
        pytest.param("fsdp1", "2,3", "", marks=pytest.mark.long),
    ],
)
def test_ranks_with_other_numbers_of_rows_run_the_teacher_together(kind, layers, saved, tmp_path):
    """Five rows and one, one in four met: in three steps of four the second rank has none, but layers are gathered.

    In the others it meets its whole batch, and the first rank a part of its own: both gather in the same order.
    """
    done = run_worker("teacher_rows.py", str(tmp_path), kind, layers, saved, ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found = torch.load(tmp_path / "result.pt")
    whole, some = found[1], found[4]
    scale = max(gradient.abs().max() for gradient in whole["mean"].values())
    for name, gradient in whole["mean"].items():
        assert (gradient - some["mean"][name]).abs().max() < 1e-5 * scale, name
    assert some["consistency"] == pytest.approx(whole["consistency"], rel=1e-5)
    assert some["shared"] == ((7, "") if layers else (0, "the first layer is adapted"))
