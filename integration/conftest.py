"""The marker of the tests here; fixtures: a base model with data and YAMLs for Axolotl, Llama's code for Liger."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from models import character_tokenizer, tiny_llama
from transformers.models.llama import modeling_llama

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest reads -m
def pytest_collection_modifyitems(items):
    """Marks every test of this directory: each trains in a host."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.hosts)


@pytest.fixture
def llama_code(monkeypatch):
    """transformers' module of Llama, which a test may have Liger patch: it is as it was for the tests after it."""
    for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward)
    return modeling_llama


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A tiny base model with its tokenizer, and a dataset."""
    path = tmp_path_factory.mktemp("axolotl")
    tiny_llama().save_pretrained(path / "base")
    character_tokenizer().save_pretrained(path / "base")
    rows = [
        {"instruction": f"What is {i} + {i}?", "input": "", "output": f"It is {2 * i}" + " ok" * (i % 3)}
        for i in range(12)
    ]
    (path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def written(workspace, tmp_path, monkeypatch):
    """Writes a YAML: the working one with `changes` (None removes a key); returns its path."""
    from axolotl.integrations.base import PluginManager

    monkeypatch.setattr(sys, "argv", ["axolotl"])
    # the manager is a singleton that keeps every plug-in it has seen
    monkeypatch.setattr(PluginManager.get_instance(), "plugins", type(PluginManager.get_instance().plugins)())

    def write(name="config.yml", **changes):
        values = {
            "base_model": str(workspace / "base"),
            "plugins": ["balora_plugin.BaLoraPlugin"],
            "adapter": "ba_lora",
            "lora_r": 4,
            "lora_alpha": 4,
            "lora_target_linear": True,
            "ba_lora": {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02},
            "datasets": [{"path": str(workspace / "data.jsonl"), "ds_type": "json", "type": "alpaca"}],
            "dataset_prepared_path": str(workspace / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "sequence_len": 256,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 3,
            "num_epochs": 1,
            "learning_rate": 0.01,
            "lr_scheduler": "constant",
            "optimizer": "adamw_torch",
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 1,
            "special_tokens": {"pad_token": "<pad>"},
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
            "device_map": {"": "cpu"},
        }
        values.update(changes)
        path = tmp_path / name
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return path

    return write
