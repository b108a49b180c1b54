"""The package as a whole: what importing it costs, its public names, documentation that runs."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from models import character_tokenizer, tiny_llama

import balora_plugin

pytestmark = pytest.mark.hosts

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "balora_plugin"
HOSTS = {"BaLoraSFTTrainer": "trl", "BaLoraPlugin": "axolotl"}


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    ).stdout


def test_importing_the_package_imports_nothing_heavy():
    heavy = "('torch', 'transformers', 'peft', 'trl', 'axolotl')"
    code = f"import sys, balora_plugin; print([m for m in {heavy} if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_the_core_imports_no_host_framework():
    code = (
        "import sys; from balora_plugin import BaLoraConfig, get_ba_lora_model, BaLoraTrainerMixin, BaLoraTrainer\n"
        "print([m for m in ('trl', 'axolotl') if m in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_every_public_name_resolves():
    for name in balora_plugin.__all__:
        if name in HOSTS and not importlib.util.find_spec(HOSTS[name]):
            continue
        assert getattr(balora_plugin, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        balora_plugin.nonsense  # noqa: B018
    assert set(balora_plugin.__all__) <= set(dir(balora_plugin))
    assert run("from balora_plugin import *; print(get_ba_lora_model.__name__)").strip() == "get_ba_lora_model"


def modules():
    names = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "balora_plugin.")]
    return ["balora_plugin", *names]


def test_docstring_examples_run():
    attempted = 0
    for name in modules():
        if any(
            host in name and not importlib.util.find_spec(host) for host in ("trl", "axolotl", "llamafactory", "swift")
        ):
            continue
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert result.failed == 0, name
        attempted += result.attempted
    assert attempted >= 5


@pytest.fixture
def local_model(tmp_path):
    """A tiny model and tokenizer on disk, in the place of the hub's."""
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def test_readme_examples_run(local_model, tmp_path, monkeypatch):
    """Every python block of the README, in order, in one namespace; only the model's name is replaced."""
    pytest.importorskip("trl")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    code = "\n".join(blocks)
    assert code.count('MODEL = "') == 1
    code = re.sub(r'MODEL = "[^"]*"', f"MODEL = {str(local_model)!r}", code)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script))
    assert (tmp_path / "outputs" / "ba-lora" / "ba_lora.json").exists()


def test_readme_names_existing_commands_and_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([\w-]+)`", text)) | set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"quickstart", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("path", sorted((ROOT / "example_configs").glob("*.py")), ids=lambda path: path.name)
def test_example_scripts_build_their_settings(path, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    settings = runpy.run_path(str(path), run_name="example")
    from trl import SFTConfig

    assert isinstance(settings["adapter"](), balora_plugin.BaLoraConfig)
    assert isinstance(settings["arguments"](use_cpu=True, bf16=False), SFTConfig)


def test_every_promise_names_a_test_that_exists():
    section = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    rows = [row for row in section.splitlines() if row.startswith("| ") and "held by" not in row]
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)
