"""An adapter or a config from elsewhere is never unpickled or run; nothing is written elsewhere or connected to."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ba_lora
from models import tiny_llama
from peft import PeftModel

from balora_plugin import BaLoraConfig, BaLoraModel

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """What a whole run did (training, resuming, loading, verify, export), and the directory of all it was given."""
    directory = tmp_path_factory.mktemp("trust")
    home = directory / "home"  # the libraries' own caches
    home.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "TORCH"))}
    env |= {
        "HOME": str(home),
        "TMPDIR": str(home),
        "BALORA_CACHE": str(directory / "cache"),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "integration" / "workers"))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",  # the libraries' own questions to the hub are not ours
        "MPLCONFIGDIR": str(home),
    }
    worker = [sys.executable, str(ROOT / "integration" / "workers" / "trust.py"), str(directory)]
    done = subprocess.run(worker, cwd=home, env=env, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory, json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_written_outside_the_directories_that_were_given(audited):
    directory, seen = audited
    assert seen["codes"] == [0, 0, 0]
    given = [str(directory / name) + os.sep for name in ("out", "cache", "home")]
    given += ["/dev/", "/proc/"]
    foreign = {path for path in seen["written"] if not any((path + os.sep).startswith(root) for root in given)}
    assert not foreign
    written = "\n".join(seen["written"])  # the hook sees what it is there for
    assert all(str(directory / name) in written for name in ("out/checkpoint-1", "out/merged", "cache/starts"))


def test_nothing_is_asked_of_the_network_and_no_program_is_started(audited):
    _, seen = audited
    assert not seen["network"]
    assert not seen["executed"]


def test_no_adapter_is_unpickled(audited):
    _, seen = audited
    assert not [name for name in seen["unpickled"] if name.startswith(("torch", "balora", "peft"))]
    assert set(seen["resumed"]) == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # the Trainer's own
    assert not seen["pickles"]  # of those that lie beside the adapter


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("start", ["pissa", True])
def test_a_pickle_in_the_place_of_the_weights_is_refused_unopened(start, tmp_path):
    ba_lora(tiny_llama(), init_lora_weights=start).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with open(tmp_path / "a" / "adapter_model.bin", "wb") as file:
        pickle.dump(Bomb(tmp_path / "exploded"), file)
    torch.save(Bomb(tmp_path / "exploded"), tmp_path / "a" / "ba_lora_init.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        BaLoraModel.from_pretrained(tiny_llama(), tmp_path / "a")
    shutil.copy(tmp_path / "a" / "adapter_model.bin", tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is not the file"):
        BaLoraModel.from_pretrained(tiny_llama(), tmp_path / "a")
    assert not (tmp_path / "exploded").exists()


def test_a_config_from_elsewhere_imports_and_runs_nothing(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"import os; os.mkdir({str(tmp_path / 'exploded')!r})\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ba_lora(tiny_llama()).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "ba_lora.json"
    settings = json.loads(path.read_text())
    mapping = {"base_model_class": "Evil", "parent_library": "evil_module"}
    for changes in (
        {"auto_mapping": mapping},
        {"auto_mapping": mapping, "target_modules": "(a+)+$"},
        {"init_lora_weights": "__import__('evil_module')"},
        {"regularizers": {"schedule": "__import__('evil_module')"}},
        {"regularizers": {"teacher_cache": "$(mkdir exploded)"}},
    ):
        path.write_text(json.dumps({**settings, "config": {**settings["config"], **changes}}))
        try:
            BaLoraConfig.from_pretrained(tmp_path / "a")
            BaLoraModel.from_pretrained(tiny_llama(), tmp_path / "a")
        except ValueError:
            pass  # refused is fine too
        assert "evil_module" not in sys.modules
        assert not (tmp_path / "exploded").exists()
    assert isinstance(PeftModel.from_pretrained(tiny_llama(), tmp_path / "a"), PeftModel)


def test_our_sources_import_no_network_and_no_pickle():
    forbidden = (
        "import pickle",
        "import socket",
        "import requests",
        "import urllib",
        "import http",
        "torch.load(",
        "eval(",
    )
    for path in (ROOT / "balora_plugin").rglob("*.py"):
        text = path.read_text().replace(".eval(", "")
        found = [name for name in forbidden if name in text]
        assert not found, (path, found)
