"""FSDP's cpu_ram_efficient_loading by transformers: every rank's start is that of rank 0, which alone has weights."""

from __future__ import annotations

import torch
from models import tiny_llama
from safetensors.torch import load_file

from balora_plugin import BaLoraConfig, get_ba_lora_model
from balora_plugin.distributed import is_loaded

from .ranks import run_worker


def test_the_start_is_made_where_the_weights_are(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    done = run_worker("efficient_loading.py", str(tmp_path / "base"), str(tmp_path), ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    model = get_ba_lora_model(base, BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    expected = {name: p for name, p in model.named_parameters() if "frozen_" in name}
    for rank in range(2):
        found = load_file(tmp_path / f"frozen-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value.abs().max() > 0
            torch.testing.assert_close(found[name], value.detach())


def test_weights_are_loaded_where_one_of_them_is_not_zero():
    zero, one, packed = torch.zeros(2), torch.ones(2), torch.zeros(2, dtype=torch.uint8)
    assert is_loaded([zero, one]) and is_loaded([packed, zero]) and is_loaded([])
    assert not is_loaded([zero, zero]) and not is_loaded([one, one.to("meta")])
    zero.ds_id = 1  # ZeRO-3 holds it in parts
    assert is_loaded([zero])
