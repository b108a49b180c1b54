"""balora doctor: versions, machines and configs as facts, so that every verdict can be asked for on any machine."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from balora_plugin.adapter.peft_releases import TESTED_PEFT
from balora_plugin.commands import main
from balora_plugin.doctor import Machine, about, look, problems, versions
from balora_plugin.doctor import machine as facts

pytestmark = pytest.mark.hosts

ROOT = Path(__file__).parents[2]
OLDER = {
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "transformers": "5.16.1",
    "peft": "0.20.0",
    "trl": "1.9.0",
    "axolotl": None,
    "llamafactory": None,
    "accelerate": "1.13.0",
    "bitsandbytes": "0.50.2",
    "deepspeed": None,
    "flash-attn": None,
}
BACKENDS = ("ba_lora", "eager", "inductor")
CPU = Machine(name="x86_64", versions=OLDER, sdpa=("flash", "math"), backends=BACKENDS, compiler="/usr/bin/g++")
GPU = dataclasses.replace(
    CPU, device="cuda", name="NVIDIA A40", memory_gib=44.4, capability=(8, 6), count=1, bf16=True, compiler="triton"
)
TURING = dataclasses.replace(GPU, name="Tesla T4", capability=(7, 5), bf16=False)
FLASH = frozenset({"flash_attn.flash_attn_interface"})


def with_versions(machine, **changes):
    return dataclasses.replace(machine, versions={**OLDER, **changes})


def requirements(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return {r.name: Version(next(iter(r.specifier)).version) for r in map(Requirement, filter(is_pin, lines))}


def is_pin(line):
    return "==" in line and not line.startswith("#")


def test_the_bounds_are_those_of_the_project():
    """pyproject.toml's lower bounds, and the releases that both sets of requirements install."""
    least = re.findall(r'"([a-z-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    for name, version in least:
        if name in versions.BOUNDS:
            assert versions.BOUNDS[name].least == version, name
    older, newest = requirements("quickstart.txt") | requirements("axolotl.txt"), requirements("newest.txt")
    llamafactory, swift = requirements("llamafactory.txt"), requirements("swift.txt")
    for name, (_, first, last, _) in versions.BOUNDS.items():
        for bound, pins in ((first, swift | older | llamafactory), (last, newest)):
            if name in pins:
                assert Version(bound).release[:2] == pins[name].release[:2], name
    for said, pins in zip(versions.TOGETHER, (older, newest, llamafactory, swift), strict=True):
        for name, version in said.items():
            assert name not in pins or Version(version).release[:2] == pins[name].release[:2], name
    lowest = requirements("lowest.txt")
    assert {name for name, _ in least} & set(versions.BOUNDS) - {"axolotl", "llamafactory", "ms-swift"} <= set(lowest)
    bounds = dict(least)
    for name, pin in lowest.items():
        assert Version(bounds[name]) == Version(f"{pin.major}.{pin.minor}"), name
    assert Version(versions.BOUNDS["peft"].least) == Version(TESTED_PEFT[0])
    last = Version(versions.BOUNDS["peft"].last).release
    assert Version(TESTED_PEFT[1]).release == (last[0], last[1] + 1)
    torch = re.search(r"TORCH \?= torch==([\d.]+)", (ROOT / "Makefile").read_text())
    assert Version(torch[1]).release[:2] == Version(versions.BOUNDS["torch"].last).release


@pytest.mark.parametrize(
    ("name", "version", "standing"),
    [
        ("peft", "0.17.1", "too old"),
        ("peft", "0.18.1", "tested"),
        ("peft", "0.21.9", "tested"),
        ("peft", "0.22.0", "newer than tested"),
        ("peft", None, "not installed"),
        ("torch", "2.9.1", "too old"),
        ("torch", "2.11.0+cu126", "tested"),
        ("torch", "2.14.0.dev20260101", "newer than tested"),
        ("axolotl", "0.19.0.dev0", "tested"),
        ("llamafactory", "0.9.5", "tested"),
        ("llamafactory", "0.9.4", "too old"),
        ("llamafactory", "0.9.6", "newer than tested"),
        ("ms-swift", "4.6.3", "tested"),
        ("transformers", "a-checkout", "supported"),
        ("deepspeed", "0.1", "supported"),
    ],
)
def test_how_a_version_stands(name, version, standing):
    assert versions.standing(name, version) == standing


def lines(report, subject):
    return [line for line in report.lines if line.subject == subject]


@pytest.mark.parametrize(
    ("changes", "state", "words", "remedy"),
    [
        ({"peft": "0.17.0"}, "PROBLEM", "too old: needs 0.18 or newer", 'pip install "peft>=0.18,<0.22"'),
        ({"transformers": None}, "PROBLEM", "not installed", 'pip install "transformers>=5.6,<5.25"'),
        ({"trl": "0.24.0"}, "PROBLEM", "too old: needs 1.9 or newer", 'pip install "trl>=1.9,<1.17"'),
        ({"trl": "0.24.0", "llamafactory": "0.9.5"}, "", "0.24.0  for llamafactory; used without it, needs 1.9", ""),
        ({"trl": "2.0"}, "note", "2.0  newer than tested (1.9 to 1.16)", 'pip install "trl>=1.9,<1.17"'),
        ({"trl": None}, "", "not installed", 'pip install "trl>=1.9,<1.17"'),
        ({"python": "3.9.1"}, "PROBLEM", "too old: needs 3.10", "make an environment with python 3.11"),
    ],
)
def test_a_version_and_the_command_that_mends_it(changes, state, words, remedy):
    report = about(with_versions(CPU, **changes))
    (line,) = lines(report, next(iter(changes)))
    assert (line.state, line.remedy) == (state, remedy)
    assert words in line.text
    assert report.usable == (state != "PROBLEM")


def test_a_host_is_named_with_what_is_untested():
    (absent,) = lines(about(CPU), "llamafactory")
    assert (absent.text, absent.remedy) == ("not installed", 'pip install "llamafactory==0.9.5.*"')
    (absent,) = lines(about(with_versions(CPU, axolotl="0.19.0")), "llamafactory")
    assert (absent.text, absent.remedy) == ("not installed; in an environment of its own, not beside axolotl", "")
    version, untested = lines(about(with_versions(CPU, llamafactory="0.9.5")), "llamafactory")
    assert version.text == "0.9.5  tested" and untested.text.startswith("not tried with it: GPUs, ")
    assert about(with_versions(CPU, llamafactory="0.9.5", trl="0.24.0", peft="0.18.1", transformers="5.6.0")).usable


def test_what_does_not_compile_is_said():
    (line,) = lines(about(with_versions(CPU, **{"ms-swift": "4.6.0"})), "compile")
    assert line.text.endswith("turns it on, but not in ms-swift")
    assert lines(about(CPU), "compile")[0].text.endswith("turns it on")


def test_packages_that_ask_for_other_versions_of_one_another():
    asked = {"axolotl": ["trl==1.9.0", "peft==0.20.0; python_version < '4'", "torch>=9; extra == 'x'", "no such line"]}
    found = versions.conflicts({"axolotl": "0.19.0", "trl": "1.16.0", "peft": "0.20.0", "torch": "2.13.0"}, asked)
    assert [tuple(conflict) for conflict in found] == [("axolotl", "0.19.0", "trl==1.9.0", "1.16.0")]
    assert not versions.conflicts(versions.installed())  # the environments of the tests


def kernel(machine, **values):
    (line,) = lines(about(machine, values), "attention")
    return line.text


def test_the_attention_kernel_that_will_be_used():
    assert kernel(CPU) == "sdpa (flash, math), the default"
    assert kernel(GPU, flash_attention=True) == "flash_attention_2, by flash_attention: true"
    assert kernel(GPU, attn_implementation="eager") == "eager, by attn_implementation: eager"
    for machine, words, command in (
        (CPU, "needs a GPU", ""),
        (TURING, "needs compute capability 8.0 or more, and this GPU has 7.5", ""),
        (GPU, "needs the package flash-attn", "pip install flash-attn --no-build-isolation"),
        (dataclasses.replace(GPU, modules=FLASH), "usable, in half precision", ""),
        (dataclasses.replace(GPU, modules=frozenset({"kernels"})), "from the hub at its first use", ""),
    ):
        (line,) = lines(about(machine), "flash_attention_2")
        assert line.text.startswith(words)
        assert line.remedy == command


def test_devices_compilers_and_quantisation():
    (device,) = lines(about(GPU), "device")
    assert device.text == "NVIDIA A40, 44 GiB, compute capability 8.6, bf16"
    (device,) = lines(about(TURING), "device")
    assert (device.state, "fp16: true" in device.text) == ("note", True)
    bare = dataclasses.replace(CPU, backends=("eager",), compiler=None, bitsandbytes="is not installed")
    report = about(bare)
    for subject, remedy in (
        ("compile", "pip install . in a clone of balora-plugin"),
        ("compiler", "apt install g++"),
        ("4-bit, 8-bit", 'pip install "bitsandbytes==0.50.*"'),
    ):
        (line,) = lines(report, subject)
        assert (line.state, line.remedy) == ("note", remedy)
    assert report.usable


AXOLOTL = {"base_model": "some/model", "plugins": ["balora_plugin.BaLoraPlugin"], "adapter": "ba_lora", "bf16": False}
NO_BNB = {"bitsandbytes": "is not installed"}
CANNOT = {
    "axolotl": (CPU, {**AXOLOTL, "fp16": False}, {"base_model": "pip install"}),
    "plugin": (CPU, {"adapter": "ba_lora"}, {"adapter": "write plugins: [balora_plugin.BaLoraPlugin]"}),
    "plugins of another type": (CPU, {"adapter": "ba_lora", "plugins": 3}, {"adapter": "write plugins: ["}),
    "flash on a CPU": (CPU, {"flash_attention": True}, {"flash_attention": "write attn_implementation: sdpa"}),
    "flash without its package": (
        GPU,
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": "pip install flash-attn --no-build-isolation, or write"},
    ),
    "flash 3": (GPU, {"attn_implementation": "flash_attention_3"}, {"attn_implementation": "pip install flash-attn-3"}),
    "flash on Turing": (TURING, {"flash_attention": True}, {"flash_attention": "write attn_implementation: sdpa"}),
    "flash without its package, in float32": (
        GPU,
        {"flash_attention": True, "bf16": False},
        {"flash_attention": "pip install flash-attn --no-build-isolation and write bf16: true, or write"},
    ),
    "flash in float32": (
        dataclasses.replace(GPU, modules=FLASH),
        {"flash_attention": True, "bf16": False},
        {"flash_attention": "write bf16: true"},
    ),
    "xformers": (GPU, {"xformers_attention": True}, {"xformers_attention": "pip install xformers"}),
    "flex on a CPU": (CPU, {"flex_attention": True}, {"flex_attention": "sdpa"}),
    "bf16 on a CPU": (CPU, {"bf16": True}, {"bf16": "write bf16: false"}),
    "bf16 on Turing": (TURING, {"bf16": True}, {"bf16": "fp16: true"}),
    "tf32 on a CPU": (CPU, {"tf32": True}, {"tf32": "tf32: false"}),
    "fp8": (GPU, {"fp8": True}, {"fp8": "remove it"}),
    "4-bit": (dataclasses.replace(CPU, **NO_BNB), {"load_in_4bit": True}, {"load_in_4bit": "pip install"}),
    "8-bit optimizer": (
        dataclasses.replace(CPU, **NO_BNB),
        {"load_in_8bit": True, "optimizer": "paged_adamw_8bit"},
        {"load_in_8bit": "bitsandbytes==0.50", "optimizer": "adamw_torch"},
    ),
    "deepspeed": (CPU, {"deepspeed": {"zero": 2}}, {"deepspeed": "pip install deepspeed"}),
    "backend": (CPU, {"torch_compile_backend": "tvm"}, {"torch_compile_backend": "write one of eager, inductor"}),
    "our backend": (
        dataclasses.replace(CPU, compiler=None),
        {"torch_compile_backend": "ba_lora"},
        {"torch_compile_backend": "apt install g++"},
    ),
    "flash without packing": (
        dataclasses.replace(GPU, modules=FLASH),
        {"flash_attention": True, "ba_lora": {"compile": True}},
        {"ba_lora.compile": "sample_packing: true"},
    ),
    "a kernel from the hub": (
        GPU,
        {"attn_implementation": "kernels-community/flash-attn2"},
        {"attn_implementation": "pip install kernels"},
    ),
    "two lines on attention": (
        CPU,
        {"attn_implementation": "sdpa", "flash_attention": True},
        {"flash_attention": "remove it"},
    ),
    "no compiler, no backend": (
        dataclasses.replace(CPU, compiler=None),
        {"torch_compile": True},
        {"torch_compile": "apt install g++"},
    ),
    "no compiler": (
        dataclasses.replace(CPU, compiler=None),
        {"ba_lora": {"compile": True}},
        {"ba_lora.compile": "apt install g++"},
    ),
    "paths": (
        CPU,
        {
            "model": "x",
            "lora_model_dir": "./not/there",
            "ba_lora": {"start_from": "/not/there.safetensors"},
            "datasets": [{"path": "not/there.jsonl"}, {"path": "tatsu-lab/alpaca"}],
        },
        {"lora_model_dir": "path", "ba_lora.start_from": "path", "datasets[0].path": "path"},
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_run_is_listed_with_key_value_and_remedy(case):
    machine, values, expected = CANNOT[case]
    found = problems(values, machine)
    assert [problem.key for problem in found] == list(expected)
    for problem in found:
        assert expected[problem.key] in problem.remedy
        assert str(problem).startswith(f"{problem.key}: ") and problem.remedy in str(problem)
    assert not about(machine, values, "c.yml").usable


CAN = {
    "flash": (dataclasses.replace(GPU, modules=FLASH), {"flash_attention": True, "bf16": True}),
    "flash by Axolotl's default precision": (dataclasses.replace(GPU, modules=FLASH), {"flash_attention": True}),
    "flash from the hub": (dataclasses.replace(GPU, modules=frozenset({"kernels"})), {"flash_attention": True}),
    "autocast on a CPU": (CPU, {"bf16": True, "use_cpu": True}),
    "what a CPU computes in float32": (CPU, {"fp16": True}),
    "4-bit": (CPU, {"load_in_4bit": True, "optimizer": "adamw_8bit"}),
    "compiled": (CPU, {"ba_lora": {"compile": True}, "torch_compile_backend": "inductor"}),
    "compiled, packed flash": (
        dataclasses.replace(GPU, modules=FLASH),
        {"flash_attention": True, "ba_lora": {"compile": True}, "sample_packing": True},
    ),
    "compiled by layer, flash": (
        dataclasses.replace(GPU, modules=FLASH),
        {"flash_attention": True, "ba_lora": {"compile": "layers"}},
    ),
    "deepspeed": (with_versions(CPU, deepspeed="0.18"), {"deepspeed": {"zero": 2}}),
    "paths": (CPU, {"datasets": [{"path": "tatsu-lab/alpaca"}, {"path": str(ROOT / "README.md")}]}),
}


@pytest.mark.parametrize("case", CAN)
def test_what_can_run_is_not(case):
    assert problems(CAN[case][1], CAN[case][0]) == []


def test_this_machine():
    """Against what torch and the environment themselves say."""
    import torch

    here = look()
    assert here.device == (torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu")
    assert here.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert here.has("axolotl") == (find_spec("axolotl") is not None)
    assert "inductor" in here.backends and "math" in here.sdpa
    assert all(find_spec(name) is not None for name in here.modules if "." not in name)


@pytest.fixture
def on(monkeypatch):
    """The command on a machine of our choice."""

    def run(machine, *arguments):
        monkeypatch.setattr("balora_plugin.doctor.look", lambda: machine)
        return main(["doctor", *map(str, arguments)])

    return run


def test_the_command(on, tmp_path, capsys):
    assert on(CPU) == 0
    text = capsys.readouterr().out
    assert text.endswith("OK\n") and len(text.splitlines()) <= 24  # one screen
    config = tmp_path / "plain.yaml"
    config.write_text(yaml.safe_dump({"flash_attention": True, "load_in_4bit": True, "bf16": True}))
    assert on(CPU, "--config", config) == 1
    text = capsys.readouterr().out
    assert [line.split()[1] for line in text.splitlines() if line.startswith("PROBLEM")] == [
        "flash_attention:",
        "bf16:",
    ]
    assert on(CPU, "--config", config, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["usable"] and report["config"] == str(config)
    assert [problem["key"] for problem in report["problems"]] == ["flash_attention", "bf16"]
    assert {line["subject"] for line in report["lines"]} >= set(versions.NAMES)
    config.write_text("bf16: false\n")
    assert on(CPU, "--config", config) == 0
    for wrong, words in (("- a\n", "no mapping"), ("a: [", "no YAML"), ("a: " + "[" * 5000, "nested too deep")):
        config.write_text(wrong)
        assert on(CPU, "--config", config) == 2
        assert words in capsys.readouterr().err
    assert on(CPU, "--config", tmp_path / "none.yaml") == 2


@pytest.mark.skipif(find_spec("axolotl") is None, reason="the plug-in's own checks need Axolotl")
def test_the_plugins_own_checks_are_asked_too(tmp_path):
    here = with_versions(CPU, axolotl="0.19.0")
    values = {**AXOLOTL, "fp16": False, "lora_r": 4, "lora_alpha": 4, "lora_target_linear": True}
    for changes in ({}, {"bf16": "auto"}, {"bf16": "auto", "fp16": True}):  # on a CPU they run, in float32
        assert problems({**values, **changes}, here) == []
    for changes, key, words in (
        ({"ba_lora": {"lambda_svdd": 0.1}}, "ba_lora.lambda_svdd", "did you mean lambda_svd?"),
        ({"lora_r": None}, "lora_r", "write for example lora_r: 16"),
        ({"relora": True}, "relora", "remove it (changes what is trained)"),
    ):
        (found,) = problems({**values, **changes}, here)
        assert found.key == key and words in str(found)
    # a setting is named where it stands, once; and where there is no GPU nothing is said of a precision that needs one
    (found,) = problems({**values, "flash_attention": True}, here)
    assert str(found) == (
        "flash_attention: true needs a GPU, and there is none here: write attn_implementation: sdpa in its place"
    )
    liger = {"plugins": [*values["plugins"], "axolotl.integrations.liger.LigerPlugin"]}
    (found,) = problems({**values, **liger, "liger_rms_norm": True, "liger_rope": False}, here)
    assert str(found) == "liger_rms_norm: true needs a GPU, and there is none here: remove it (trains the same)"


@pytest.mark.skipif(find_spec("axolotl") is None, reason="Axolotl's YAMLs need Axolotl")
def test_the_examples_are_held_against_machines(monkeypatch):
    """On a CPU each says why not; on a large GPU with everything installed nothing is left to say."""
    monkeypatch.chdir(ROOT)
    here = with_versions(CPU, axolotl="0.19.0")
    gpu = dataclasses.replace(GPU, versions={**here.versions, "deepspeed": "0.18"}, modules=FLASH)
    for path in sorted((ROOT / "example_configs").rglob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        if "base_model" not in values:
            continue
        if path.name == "quickstart.yaml":
            made = {"base_model", "datasets[0].path", "test_datasets[0].path"}  # by make quickstart, here or not
            assert {problem.key for problem in problems(values, here)} <= made
            continue
        assert problems(values, gpu) == [], path
        assert "bf16" in {problem.key for problem in problems(values, here)}, path


def test_hosts_are_not_imported_and_may_be_absent():
    """Even with a config, where Axolotl cannot be imported; nothing is asked of the network."""
    code = (
        "import sys, socket\n"
        "sys.modules['axolotl'] = sys.modules['trl'] = None\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from balora_plugin.doctor import versions\n"
        "known = versions.installed()\n"
        "import balora_plugin.doctor.machine as machine\n"
        "machine.installed = lambda: {**known, 'axolotl': None, 'trl': None}\n"
        "from balora_plugin.commands import main\n"
        "code = main(['doctor', '--config', sys.argv[1]])\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    example = ROOT / "example_configs" / "qwen2.5_0.5b_alpaca.yaml"
    found = subprocess.run([sys.executable, "-c", code, str(example)], capture_output=True, text=True, timeout=200)
    assert found.returncode == 1, found.stderr[-2000:]
    assert "base_model: Qwen/Qwen2.5-0.5B needs Axolotl" in found.stdout


def test_a_compiler_is_looked_for_where_inductor_looks(monkeypatch):
    """Inductor takes $CXX or the system's own: another compiler beside is none to it."""
    monkeypatch.setattr(facts.shutil, "which", lambda name: f"/bin/{name}" if name in ("clang++", "clang") else None)
    monkeypatch.delenv("CXX", raising=False), monkeypatch.delenv("CC", raising=False)
    for system, compiler in (("Linux", None), ("Darwin", "/bin/clang++")):
        monkeypatch.setattr(facts.platform, "system", lambda system=system: system)
        assert facts._compiler(CPU) == compiler
    monkeypatch.setattr(facts.platform, "system", lambda: "Linux")
    monkeypatch.setenv("CXX", "clang++")
    assert facts._compiler(CPU) == "/bin/clang++"
    monkeypatch.delenv("CXX")
    assert facts._compiler(GPU) is None
    assert facts._compiler(dataclasses.replace(GPU, modules=frozenset({"triton"}))) == "triton with /bin/clang"
    monkeypatch.setenv("CXX", "none++")
    assert facts._compiler(CPU) is None


@pytest.mark.parametrize(
    ("changes", "device", "why"),
    [
        ({}, "cuda", None),
        ({"bitsandbytes": None}, "cuda", "is not installed"),
        ({"bitsandbytes": "0.45.1"}, "cpu", "is too old"),
        ({}, "privateuse", "has no kernels for privateuse"),
    ],
)
def test_bitsandbytes(changes, device, why):
    assert facts.unusable_bitsandbytes(dataclasses.replace(with_versions(CPU, **changes), device=device)) == why
