"""What PEFT's own arguments mean here: low_cpu_mem_usage, custom modules, from_pretrained(config=)."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from helpers import TERMS, logits, reads_experts, train
from models import tiny_llama, tiny_mixtral
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from balora_plugin import BaLoraConfig, BaLoraModel, get_ba_lora_model

pytestmark = pytest.mark.hosts


def config_of(**changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return BaLoraConfig(**{**values, **changes})


# --- low_cpu_mem_usage

KINDS = {
    "delta": {},
    "ordinary": {"init_lora_weights": True},
    "random": {"init_lora_weights": False},
    "whole_modules": {"modules_to_save": ["lm_head"], "use_rslora": True, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_cpu_mem_usage_gives_the_same_model_bit_for_bit(kind, dtype, autocast):
    found = []
    for low in (False, True):
        base = tiny_llama().to(dtype)
        torch.manual_seed(7)
        model = get_ba_lora_model(
            base, config_of(**KINDS[kind]), autocast_adapter_dtype=autocast, low_cpu_mem_usage=low
        )
        found.append((dict(model.named_parameters()), torch.rand(3)))
    (there, random), (here, random_too) = found
    assert there.keys() == here.keys() and torch.equal(random, random_too)
    for name, value in there.items():
        assert here[name].dtype == value.dtype and here[name].requires_grad == value.requires_grad, name
        assert torch.equal(here[name], value), name


@reads_experts
def test_low_cpu_mem_usage_of_experts_trains_the_same(ids):
    losses = []
    for low in (False, True):
        config = config_of(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
        torch.manual_seed(7)
        losses.append(train(get_ba_lora_model(tiny_mixtral(), config, low_cpu_mem_usage=low), ids, steps=2))
    assert losses[0] == losses[1]


def test_low_cpu_mem_usage_when_loading(ids, tmp_path):
    model = get_ba_lora_model(tiny_llama(), config_of())
    train(model, ids, steps=2)
    model.save_pretrained(tmp_path)
    loaded = [BaLoraModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low) for low in (False, True)]
    assert torch.equal(*(logits(each.eval(), ids) for each in loaded))
    assert not any(p.is_meta for p in loaded[1].parameters())


# --- layers of the caller's own


class Stretch(nn.Module):
    """A linear layer that is no nn.Linear."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class LoraStretch(Linear):
    """PEFT's linear layer, on another module."""


class OwnForward(Linear):
    def forward(self, x, *args, **kwargs):
        return self.base_layer(x)


class NoLinear(nn.Module, LoraLayer):
    """A layer as PEFT's documentation has it, with a forward of its own."""

    def __init__(self, base_layer, adapter_name, config, r, lora_alpha, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x):
        result = self.base_layer(x)
        for name in () if self.disable_adapters else self.active_adapters:
            result = result + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return result


def stretched():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.down_proj = Stretch(layer.mlp.down_proj)
    return model


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_layer_over_pefts_linear_has_the_delta_form(ids, tmp_path):
    targets = ["down_proj", "q_proj"]
    plain = get_ba_lora_model(tiny_llama(), config_of(target_modules=targets))
    config = config_of(target_modules=targets)
    config._register_custom_module({Stretch: LoraStretch})
    model = get_ba_lora_model(stretched(), copy.deepcopy(config))
    assert isinstance(model.base_model.model.model.layers[0].mlp.down_proj, LoraStretch)
    assert torch.equal(logits(model, ids), logits(stretched(), ids))
    assert train(model, ids, steps=3) == train(plain, ids, steps=3)  # the same weights in an nn.Linear
    model.save_pretrained(tmp_path)
    again = BaLoraModel.from_pretrained(stretched(), tmp_path, config=config)
    assert torch.equal(logits(again.eval(), ids), logits(model.eval(), ids))


@pytest.mark.parametrize(("layer", "words"), [(OwnForward, "has a forward of its own"), (NoLinear, "is no subclass")])
def test_a_layer_that_would_leave_the_start_out_is_refused_before_anything_is_changed(layer, words):
    config = config_of()
    with pytest.raises(ValueError, match=rf"Stretch: {layer.__name__}.*{words}.*init_lora_weights=True"):
        config._register_custom_module({Stretch: layer})
    assert not config.custom_modules


@reads_experts
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_an_ordinary_start_takes_any_layer(ids):
    config = config_of(target_modules=["down_proj"], init_lora_weights=True, regularizers=TERMS)
    config._register_custom_module({Stretch: NoLinear})
    model = get_ba_lora_model(stretched(), config)
    before = logits(model, ids)
    assert len(set(train(model, ids, steps=2))) == 2
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before)


# --- from_pretrained(config=)


@pytest.fixture
def saved(ids, tmp_path):
    model = get_ba_lora_model(tiny_llama(), config_of(target_modules=["q_proj", "v_proj"]))
    train(model, ids, steps=2)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_given_config_is_taken_instead_of_the_directorys(saved, ids):
    model, directory = saved
    config = BaLoraConfig.from_pretrained(directory)
    config.lora_dropout, config.base_model_name_or_path, config.regularizers = 0.25, "moved/base", TERMS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT's calls of transformers
        loaded = BaLoraModel.from_pretrained(tiny_llama(), directory, config=config, is_trainable=True)
    here = loaded.peft_config["default"]
    assert (here.lora_dropout, here.base_model_name_or_path, here.inference_mode) == (0.25, "moved/base", False)
    assert here.regularizers == TERMS and here is not config
    assert torch.equal(logits(loaded.eval(), ids), logits(model.eval(), ids))
    assert BaLoraModel.from_pretrained(tiny_llama(), directory, config=config).peft_config["default"].inference_mode


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 2}, r"r=2 here, but .* has r=4: write 4"),
        ({"lora_alpha": 8}, r"lora_alpha=8 here, but .* has lora_alpha=4"),
        ({"use_rslora": True}, r"use_rslora=True here, but .* has use_rslora=False"),
        ({"alpha_pattern": {"q_proj": 8}}, r"alpha_pattern=\{'q_proj': 8\} here, but .*alpha_pattern=\{\}.*q_proj"),
        ({"rank_pattern": {"v_proj": 2}}, r"rank_pattern=\{'v_proj': 2\} here, but .*rank_pattern=\{\}.*v_proj"),
        ({"init_lora_weights": True}, "init_lora_weights=True here, but .* has init_lora_weights='pissa'"),
    ],
)
def test_what_contradicts_the_factors_is_refused_with_both_values(changes, words, saved):
    _, directory = saved
    config = config_of(**{"target_modules": ["q_proj", "v_proj"], **changes})
    with pytest.raises(ValueError, match=words):
        BaLoraModel.from_pretrained(tiny_llama(), directory, config=config)


def test_an_ordinary_lora_of_ours_is_compared_too(ids, tmp_path):
    get_ba_lora_model(tiny_llama(), config_of(init_lora_weights=True)).save_pretrained(tmp_path)
    for changes in ({"lora_alpha": 8}, {"alpha_pattern": {"q_proj": 8}}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* here, but"):
            BaLoraModel.from_pretrained(tiny_llama(), tmp_path, config=config_of(init_lora_weights=True, **changes))


def test_patterns_that_mean_the_same_are_the_same(saved, ids):
    model, directory = saved
    config = config_of(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4}, alpha_pattern={".*v_proj": 4})
    loaded = BaLoraModel.from_pretrained(tiny_llama(), directory, config=config)
    assert torch.equal(logits(loaded.eval(), ids), logits(model.eval(), ids))
    scalings = {layer.scaling["default"] for layer in loaded.modules() if isinstance(layer, LoraLayer)}
    assert scalings == {1.0}


# --- a config written over a finished adapter


def test_only_a_run_that_is_not_resumed_there_warns_of_the_adapter_before(saved, caplog):
    _, directory = saved
    before = (directory / "ba_lora.json").read_bytes()
    config = config_of()
    with caplog.at_level(logging.WARNING):
        config.resumed_in = str(directory)
        config.save_pretrained(directory)
        assert not caplog.records
        config.resumed_in = str(directory.parent)
        config.save_pretrained(directory)
    assert ["earlier run" in record.message for record in caplog.records] == [True]
    assert (directory / "ba_lora.json").read_bytes() == before
