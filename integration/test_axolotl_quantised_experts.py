"""`quantize_moe_experts` with `adapter: ba_lora`: fused experts in 4 or 8 bits as Axolotl stores them, adapted or not.

Axolotl quantises what it puts on a CUDA device; here bitsandbytes quantises on the CPU (moe_on_cpu.py).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("axolotl")
pytest.importorskip("bitsandbytes")

import bitsandbytes
import transformers.core_model_loading
import transformers.modeling_utils
from axolotl.cli.config import load_cfg
from axolotl.cli.main import cli
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.cli.utils import load_model_and_tokenizer
from axolotl.monkeypatch import moe_quant
from click.testing import CliRunner
from helpers import assert_stored_weights, logits, stored_weights
from models import character_tokenizer, tiny_mixtral
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from balora_plugin.adapter.delta import DeltaParamWrapper, base_matrix, delta_layers_of
from balora_plugin.commands import main
from balora_plugin.hosts.axolotl import experts
from balora_plugin.pretrained.quantised_experts import dequantise_experts, quantised_experts, stored_parameter
from balora_plugin.pretrained.switch import TeacherSwitch

from . import moe_on_cpu
from .axolotl_run import history, run
from .test_axolotl_sharded import LAYERS, check_same

ADAPTED = {
    "lora_target_linear": None,
    "lora_target_modules": ["q_proj", "o_proj"],
    "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
HOW = {4: {"bits": 4, "quant_type": "nf4", "double_quant": True}, 8: {"bits": 8}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    tiny_mixtral(hidden_size=64, intermediate_size=64).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def written(written, base):
    return partial(written, base_model=str(base), quantize_moe_experts=True)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Axolotl's function, for any device; returns what ends it, as it holds for whatever a process loads after.

    What it and its other patches leave behind is taken back.
    """
    loading = transformers.core_model_loading
    quantises_nothing = loading.set_param_for_module
    for where, name in (
        (transformers.core_model_loading, "set_param_for_module"),
        (transformers.modeling_utils, "caching_allocator_warmup"),
        (BaseTuner, "_inject_parameters"),
        (ParamWrapper, "_activate_lora"),
    ):
        monkeypatch.setattr(where, name, getattr(where, name))
    monkeypatch.setattr(BaseTuner, "_check_target_module_exists", staticmethod(BaseTuner._check_target_module_exists))
    monkeypatch.setattr(moe_quant.patch_peft_target_parameters_matching, "_axolotl_patched", False, raising=False)
    monkeypatch.setattr(moe_quant, "_moe_load_state", {**moe_quant._moe_load_state, "patched": False})

    for where, name in (
        (moe_quant, moe_on_cpu.NAME),
        (experts, moe_on_cpu.NAME),
        (bitsandbytes.functional, "int8_vectorwise_quant"),
    ):
        monkeypatch.setattr(where, name, getattr(where, name))
    moe_on_cpu.quantise_on_any_device()
    return lambda: setattr(loading, "set_param_for_module", quantises_nothing)


def loaded(path):
    """The model as Axolotl loads it for a YAML, its adapter taken off."""
    model = load_model_and_tokenizer(cfg=load_cfg(str(path)))[0].train()
    return model.unload()


def experts_of(model):
    """{name in the base: packed weight}"""
    return {
        f"{where}.{name}".replace(".base_layer", "").removeprefix("base_model.model."): stored_parameter(module, name)
        for where, module, name in quantised_experts(model)
    }


def test_adapted_experts(as_on_cuda, written, ids, tmp_path, base, capsys):
    settings = {**ADAPTED, "load_in_4bit": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    path = written(**settings)
    trainer = run(path)
    model = trainer.model.train()
    assert history(trainer, "balora/consistency")[0] == 0 < history(trainer, "balora/consistency")[-1]
    layers = [layer for _, layer in delta_layers_of(model) if isinstance(layer, DeltaParamWrapper)]
    assert len(layers) == 2 * 2
    for layer in layers:
        assert layer.lora_B["default"].weight.abs().max() > 0  # beside the other adapted parameter of its module
        w = base_matrix(layer)[2]
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        a = layer.frozen_A["default"].weight.reshape(4, 4, -1)[2]
        b = layer.frozen_B["default"].weight.reshape(-1, 4, 4)[:, :, 2]
        torch.testing.assert_close(b @ a, u[:, :4] * s[:4] @ vh[:4], rtol=1e-3, atol=1e-4)

    fresh = loaded(path)  # base bytes, step 0, plain PEFT over the same stored experts
    before, here = experts_of(fresh), experts_of(model)
    assert len(before) == 4 and before.keys() == here.keys()
    assert all(each.how == HOW[4] and torch.equal(here[key].original, each.original) for key, each in before.items())
    assert_stored_weights(model, stored_weights(fresh))
    expected, teacher = logits(model, ids), logits(fresh, ids)
    with TeacherSwitch(model).off():
        assert torch.equal(logits(model, ids), teacher)
    assert (expected - teacher).abs().max() > 0.05
    output = trainer.args.output_dir
    stock = PeftModel.from_pretrained(fresh, output).train()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=0, atol=1e-5)
    plain = stock.unload()
    dequantise_experts(plain)
    stock = PeftModel.from_pretrained(plain, output).train()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=0, atol=1e-5)

    assert main(["verify", output, "--base", str(base)]) == 0
    assert "is the recorded one" in capsys.readouterr().out
    resumed = run(written(**settings, resume_from_checkpoint=f"{output}/checkpoint-2"))
    ends = [{k: v for k, v in each.state_dict().items() if "lora_" in k} for each in (model, resumed.model)]
    assert ends[0] and all(torch.equal(ends[1][key], value) for key, value in ends[0].items())
    merge_lora(str(written(**settings)))
    as_on_cuda()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-4)


def test_experts_beside_the_adapter_in_8_bits(as_on_cuda, written, ids, tmp_path, monkeypatch):
    # Axolotl's preparation has states in float16 meet a router in float32, which on a GPU autocast brings together
    forward = MixtralTopKRouter.forward
    monkeypatch.setattr(MixtralTopKRouter, "forward", lambda self, x: forward(self, x.to(self.weight.dtype)))
    path = written(load_in_8bit=True)
    trainer = run(path)
    model = trainer.model.train()
    assert history(trainer, "balora/consistency")[0] == 0 < history(trainer, "balora/consistency")[-1]
    assert not any(isinstance(layer, DeltaParamWrapper) for _, layer in delta_layers_of(model))
    fresh = loaded(path)
    before, here = experts_of(fresh), experts_of(model)
    assert len(before) == 4
    assert all(each.how == HOW[8] and torch.equal(here[key].original, each.original) for key, each in before.items())
    with TeacherSwitch(model).off():
        assert torch.equal(logits(model, ids), logits(fresh, ids))
    expected = logits(model, ids)
    stock = PeftModel.from_pretrained(fresh, trainer.args.output_dir).train()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=0, atol=5e-3)
    merge_lora(str(path))
    as_on_cuda()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype=torch.float32)
    for name, each in before.items():  # merged into what was trained on
        where, _, parameter = name.rpartition(".")
        rounded = getattr(fresh.get_submodule(where), parameter)
        torch.testing.assert_close(merged.get_parameter(name), rounded, rtol=0, atol=1e-6)
        assert each.how == HOW[8]


FSDP = {
    **LAYERS,
    "transformer_layer_cls_to_wrap": "MixtralDecoderLayer",
    "cpu_ram_efficient_loading": False,
    "state_dict_type": "FULL_STATE_DICT",
}


@pytest.mark.slow
@pytest.mark.long
def test_quantised_experts_may_be_sharded(as_on_cuda, written, tmp_path):
    plugins = ["balora_plugin.BaLoraPlugin", "integration.moe_on_cpu.ShardedExpertsPlugin"]
    check_same(written, tmp_path, FSDP, load_in_4bit=True, plugins=plugins, **ADAPTED)


def test_experts_that_were_not_quantised_are_refused(written, ids):
    """Without a CUDA device Axolotl leaves them in full precision without a word."""
    with pytest.raises(ValueError, match=r"^quantize_moe_experts: true, but .*CUDA.* GB in bfloat16.*ZeRO-3"):
        loaded(written(load_in_4bit=True))


WRONG = {
    "unquantised": ({}, "quantize_moe_experts: true needs a base that is quantised"),
    "start": (
        {**ADAPTED, "load_in_4bit": True, "ba_lora": {"start_from": "some/model"}},
        "ba_lora.start_from: 'some/model' reads the weights of linear layers alone",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_yaml_gives_one_clear_line(case, written):
    changes, words = WRONG[case]
    result = CliRunner().invoke(cli, ["train", str(written(**changes)), "--launcher", "python"])
    assert result.exit_code == 1
    (line,) = (line for line in result.output.splitlines() if line.startswith("Error: "))
    assert words in line


def test_experts_are_quantised_by_cuda_alone():
    values = {"adapter": "ba_lora", "quantize_moe_experts": True, "load_in_4bit": True}
    with pytest.raises(ValueError, match="quantize_moe_experts: true is quantised by CUDA alone, not on gfx942"):
        experts.validated({**values, "capabilities": {"compute_capability": "gfx942"}}, dict)


@pytest.mark.parametrize("there", [True, False])
def test_the_size_of_experts_is_read_from_the_models_config(there, tmp_path):
    config = tiny_mixtral().config
    config.update({"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_local_experts": 8})
    config.save_pretrained(tmp_path)
    gigabytes = 32 * 8 * 3 * 4096 * 14336 * 2 / 1e9  # Mixtral-8x7B's
    found = experts.size_of_experts({"base_model": str(tmp_path if there else tmp_path / "none")})
    assert found == (f"{gigabytes:.3g} GB in bfloat16" if there else "")
