"""balora doctor --gpu: whether a YAML's step fits, by how much, and what would make it fit."""

from __future__ import annotations

import dataclasses
import json

import pytest
import yaml
from transformers import LlamaConfig

from balora_plugin.commands import main
from balora_plugin.doctor import gpu_named, look, memory_on
from balora_plugin.doctor.gpus import GPUS
from balora_plugin.doctor.memory import room_on
from balora_plugin.memory.estimate import GIB

pytestmark = pytest.mark.hosts


def test_gpus_are_known_by_name():
    for name, gpu in GPUS.items():
        assert gpu_named(name.upper()) is gpu and gpu.name == name
        assert 0.8 * gpu.mib * 2**20 < room_on(gpu) < gpu.mib * 2**20
    assert gpu_named("a100") == gpu_named("a100_80")
    with pytest.raises(ValueError, match=r"--gpu h1000 is not known: write one of a10, a100, a100-40"):
        gpu_named("h1000")


@pytest.mark.parametrize(
    ("values", "axolotl", "said"),
    [
        ({"model": "x"}, True, "the file names no base_model"),
        ({"base_model": "x"}, False, "Axolotl is not installed"),
    ],
)
def test_what_cannot_be_counted_is_one_line(values, axolotl, said):
    found = memory_on(values, [gpu_named("a40")], axolotl=axolotl)
    assert found.lines == (f"not counted: {said}",)
    assert not found.fits


def test_a_gpu_without_a_config_is_refused(capsys):
    assert main(["doctor", "--gpu", "a40"]) == 2
    assert "--gpu a40 asks whether a run fits, and no run is named: add --config FILE." in capsys.readouterr().err


@pytest.fixture
def a_yaml(tmp_path):
    pytest.importorskip("axolotl")
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8, vocab_size=32000
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "model")

    def write(**changes):
        values = {
            "base_model": str(tmp_path / "model"),
            "plugins": ["balora_plugin.BaLoraPlugin"],
            "adapter": "ba_lora",
            "lora_r": 16,
            "lora_alpha": 16,
            "lora_target_linear": True,
            "micro_batch_size": 1,
            "sequence_len": 512,
            "bf16": True,
            **changes,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_a_run_that_fits_and_one_that_does_not(a_yaml, capsys):
    main(["doctor", "--config", str(a_yaml()), "--gpu", "a40", "--json"])
    found = json.loads(capsys.readouterr().out)["memory"]
    assert found["fits"][0]["name"] == "a40"
    small = found["estimate"]
    linear = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert small["weights"] == pytest.approx(2 * (linear + 2 * 32000 * 1024), rel=0.01)
    rank = 16 * 2 * (4 * 2 * 1024 + 3 * (1024 + 4096))
    assert small["trained"] == small["frozen_factors"] == 4 * rank
    assert small["optimizer"] == 2 * small["trained"]
    assert main(["doctor", "--config", str(a_yaml(micro_batch_size=96, sequence_len=4096)), "--gpu", "l4"]) == 1
    out = capsys.readouterr().out
    assert "l4: does not fit, " in out
    places = [out.index(each) for each in ("micro_batch_size: 48", "gradient_checkpointing: true saves")]
    assert places == sorted(places)


def test_a_quantised_base_and_a_cached_teacher_are_read_from_the_yaml(a_yaml):
    def of(**changes):
        return memory_on(yaml.safe_load(a_yaml(**changes).read_text()), [gpu_named("a40")], axolotl=True).estimate

    plain, packed = of(), of(load_in_4bit=True)
    linear = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    assert plain["weights"] - packed["weights"] == pytest.approx(1.5 * linear, rel=0.03)
    assert of(optimizer="adamw_8bit")["optimizer"] == pytest.approx(plain["optimizer"] / 4, rel=0.03)
    assert of(micro_batch_size=2)["total"] > plain["total"]
    assert of(lora_r=32)["trained"] == 2 * plain["trained"]
    assert plain["total"] < GIB


def test_a_value_that_is_none_is_named_with_what_to_write(a_yaml):
    values = yaml.safe_load(a_yaml(ba_lora={"lambda_svd": "much"}).read_text())
    (line,) = memory_on(values, [gpu_named("a40")], axolotl=True).lines
    assert line == "not counted: ba_lora.lambda_svd: 'much' is no value for it: write a number from 0 to 1e+06"


def test_the_gpu_that_is_named_is_judged_in_the_place_of_this_machine(a_yaml, monkeypatch, capsys):
    here = dataclasses.replace(look(), device="cpu", bf16=False, compiler=None, capability=None)
    monkeypatch.setattr("balora_plugin.doctor.look", lambda: here)
    path = str(a_yaml(tf32=True))
    assert main(["doctor", "--config", path]) == 1
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("PROBLEM")} == {
        "bf16:",
        "tf32:",
    }
    assert main(["doctor", "--config", path, "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    assert "could not run on h100" in said and "h100, 80 GiB, compute capability 9.0, bf16" in said
    assert "CPU (" not in said
    assert main(["doctor", "--config", path, "--gpu", "t4", "a40", "--json"]) == 0  # one of them is enough
    report = json.loads(capsys.readouterr().out)
    assert [problem["key"] for problem in report["judged"]["t4"]] == ["bf16", "tf32"]
    assert report["judged"]["a40"] == [] and [p["key"] for p in report["problems"]] == ["bf16", "tf32"]
    assert main(["doctor", "--config", path, "--gpu", "t4"]) == 1
    assert "cannot run on t4:" in capsys.readouterr().out


def test_a_model_that_is_not_here_is_one_line(a_yaml):
    values = yaml.safe_load(a_yaml(base_model="nobody/nothing-of-this-name").read_text())
    (line,) = memory_on(values, [gpu_named("a40")], axolotl=True).lines
    assert line.startswith("not counted: base_model: nobody/nothing-of-this-name has no config here")
