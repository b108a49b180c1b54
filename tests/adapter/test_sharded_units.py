"""The delta form's layers split by FSDP2 (a process group of one, on a CPU)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import ba_lora
from models import tiny_llama
from peft.tuners.lora import LoraLayer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def split(model, mesh, **policy):
    """What Axolotl makes units of: each trained factor, each decoder layer, the rest."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    units = [getattr(layer, name)["default"] for layer in layers for name in ("lora_A", "lora_B")]
    units += [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
    for unit in [*units, model]:
        fully_shard(unit, mesh=mesh, **policy)
    return layers


def test_frozen_factors_stay_in_the_dtype_that_fsdp2_gathers_them_in(mesh):
    """The trained ones look like float32 until their own forward; a cast to that kept A0 and B0 whole on every rank."""
    model = ba_lora(tiny_llama().to(torch.bfloat16))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    seen = []
    layers = split(model, mesh, mp_policy=half)
    for layer in layers:
        assert layer.lora_A["default"].weight.dtype == layer.frozen_A["default"].weight.dtype == torch.float32
        layer.frozen_A["default"].register_forward_pre_hook(lambda module, args: seen.append(module.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(5, 13).reshape(1, 8))
    assert len(seen) == len(layers) and set(seen) == {torch.bfloat16}


def test_a_split_model_is_not_saved_by_one_process_alone(mesh, tmp_path):
    """Whoever saves alone would wait for the others at the first tensor, for ever."""
    model = ba_lora(tiny_llama())
    split(model, mesh)
    with pytest.raises(ValueError, match=r"split over processes.*save_model on every process"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
