"""Python of the pages and the notebooks runs: on tiny models in the place of those that are named."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from classifiers import classifier
from models import character_tokenizer, tiny_llama
from test_pages import RUN

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
SHELL = re.compile(r"^!(.*)$", re.MULTILINE)
SMALL = {"STEPS": "2"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty directory with a tiny language model and a tiny classifier in it."""
    character_tokenizer().save_pretrained(tmp_path / "language_model")
    tiny_llama().save_pretrained(tmp_path / "language_model")
    character_tokenizer().save_pretrained(tmp_path / "classifier")
    classifier("bert", num_labels=2).save_pretrained(tmp_path / "classifier")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_values(code, **values):
    """`code` in which each of these names is given another value, once."""
    for name, value in values.items():
        code, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value}", code, flags=re.MULTILINE)
        assert count == 1, name
    return code


def run(code, directory):
    """What a program leaves, run in this process."""
    script = directory / "example.py"
    script.write_text(code, encoding="utf-8")
    return runpy.run_path(str(script))


def model_for(code, directory):
    """The tiny model that stands for the one a program names."""
    return repr(str(directory / ("classifier" if "SequenceClassification" in code else "language_model")))


def cells(name):
    """The code of a notebook's cells, in order."""
    found = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert all(cell["id"] for cell in found["cells"])
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "kept without outputs"
    return ["".join(cell["source"]) for cell in code]


@pytest.mark.parametrize("page", sorted(RUN - {"README.md"}))  # README's: tests/test_package.py
def test_python_of_a_page_runs(page, here):
    pytest.importorskip("trl")
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    left = run(with_values(code, MODEL=model_for(code, here)), here)
    assert left["trainer"].state.global_step == 2
    assert any(path.name == "ba_lora.json" for path in here.rglob("ba_lora.json"))


@pytest.mark.parametrize("name", ["trl.ipynb", pytest.param("transformers.ipynb", marks=pytest.mark.slow)])
def test_a_notebook_runs(name, here, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = "\n".join(cells(name))
    steps = {"STEPS": "4"} if "STEPS // 4" in code else SMALL
    left = run(with_values(code, MODEL=model_for(code, here), **steps), here)
    measured = left.get("results", {}).get("ba_lora", left.get("measured"))
    assert measured["eval_balora/consistency"] >= 0
    assert (here / "outputs" / ("ba_lora" if "results" in left else "classifier") / "adapter_config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("axolotl") is None, reason="needs Axolotl")
def test_the_notebook_of_commands_runs(here):
    """Cells in one namespace; a shell cell's command with the names in braces filled in, from this environment."""
    names: dict = {}
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": beside, "CUDA_VISIBLE_DEVICES": ""}
    said = ""
    for code in cells("axolotl.ipynb"):
        for command in SHELL.findall(code):
            words = shlex.split(command.format(**names))
            if words[0] == "balora":
                words = [sys.executable, "-m", "balora_plugin.commands", *words[1:]]
            done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=here)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
            said += done.stdout
        if not SHELL.search(code):
            code = re.sub(r"^MODEL = [^#\n]*", f"MODEL = {str(here / 'language_model')!r}", code, flags=re.MULTILINE)
            exec(re.sub(r"^STEPS = .*", "STEPS = 2", code, flags=re.MULTILINE), names)
    assert "adapter: lora -> ba_lora" in said and "balora/consistency" in said
    assert (here / names["OUTPUT"] / "ba_lora.json").exists()
