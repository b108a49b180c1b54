"""The delta form's layers split by FSDP2 (a process group of one, on a CPU)."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from classifiers import classifier
from helpers import ba_lora
from models import tiny_llama
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from balora_plugin.training.sharded_adapter import LoadsAdapterItself, RestoreAdapter, untrained_tensors

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


@pytest.fixture
def gathered(monkeypatch):
    """What ZeRO-3 is asked to make whole, in a list."""
    asked = []

    @contextmanager
    def gathering(parameters, **kwargs):
        asked.extend(parameters)
        yield

    zero = ModuleType("deepspeed.runtime.zero")
    zero.GatheredParameters = gathering
    for name in ("deepspeed", "deepspeed.runtime"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, zero.__name__, zero)
    return asked


def split_by_zero(model):
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    return model


def test_zero3_gathers_for_a_save_what_the_adapters_files_hold(gathered):
    """A0, B0, a classifier's first head; no embeddings, which are as large as they come."""
    model = split_by_zero(ba_lora(tiny_llama(), targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    found = untrained_tensors(model, keep=True)
    assert found and all("frozen_" in name for name in found)
    assert len(gathered) == len(found)
    model = split_by_zero(ba_lora(classifier(), targets=["query"], task_type="SEQ_CLS"))
    heads = {name for name in untrained_tensors(model, keep=True) if "frozen_" not in name}
    assert heads == {name for name, _ in model.named_parameters() if ".original_module." in name} != set()
    assert untrained_tensors(model, keep=False) == {}


class Loads:
    def _load_from_checkpoint(self, checkpoint, model=None):
        self.loaded = checkpoint

    def _load_best_model(self):
        self.loaded = "best"


@pytest.mark.parametrize(("sharded", "active", "by_host"), [(1, "default", 0), (0, "default", 1), (1, "plain", 1)])
def test_the_host_loads_every_adapter_that_is_not_restored_here(sharded, active, by_host, llama):
    """A run restores what is active: another kind beside a frozen one of ours would go on from its first values."""
    trainer = type(
        "Trainer",
        (LoadsAdapterItself, Loads),
        {"loaded": None, "is_fsdp_enabled": bool(sharded), "is_deepspeed_enabled": False},
    )()
    trainer.state = SimpleNamespace(best_model_checkpoint="best")
    trainer.model = ba_lora(llama, targets=["q_proj"])
    trainer.model.add_adapter("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    trainer.model.set_adapter(active)
    trainer._load_from_checkpoint("checkpoint-1")
    assert trainer.loaded == ("checkpoint-1" if by_host else None)
    trainer._load_best_model()
    assert trainer.loaded == ("best" if by_host else None)


def test_every_active_adapter_is_restored(llama, tmp_path):
    """The host loads none of them: one of another kind before ours would be restored in its place."""
    model = ba_lora(llama, targets=["q_proj"])
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["v_proj"]))
    model.base_model.set_adapter(["plain", "default"])
    trained = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    for number, parameter in enumerate(trained.values(), 1):
        parameter.data.fill_(number / 8)
    model.save_pretrained(tmp_path)
    for parameter in trained.values():
        parameter.data.zero_()
    host = SimpleNamespace(model=model, model_wrapped=model, is_fsdp_enabled=True)
    RestoreAdapter(host, str(tmp_path)).on_train_begin(None, None, None)
    for number, parameter in enumerate(trained.values(), 1):
        torch.testing.assert_close(parameter, torch.full_like(parameter, number / 8))
