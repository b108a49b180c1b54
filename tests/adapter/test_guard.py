"""PEFT's free functions do not write stock factors over dA and dB."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import ba_lora, logits, stock, train
from models import tiny_llama
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from torch import nn

pytestmark = pytest.mark.hosts


@pytest.fixture
def trained(ids):
    model = ba_lora(tiny_llama())
    train(model, ids, steps=2)
    return model.eval()


@pytest.fixture
def other(ids, tmp_path):
    """A stock LoRA of the same rank, and where it is saved."""
    model = stock(tiny_llama())
    train(model, ids, steps=2)
    model.save_pretrained(tmp_path / "other")
    return model, str(tmp_path / "other")


def same_rank(model, other, directory):
    hotswap_adapter(model, directory, adapter_name="default", torch_device="cpu")


def smaller_rank(model, other, directory):
    ba_lora(tiny_llama(), r=2).save_pretrained(directory)
    hotswap_adapter(model, directory, adapter_name="default", torch_device="cpu")


def twice_the_rank(model, other, directory):
    ba_lora(tiny_llama(), r=4).save_pretrained(directory)
    hotswap_adapter(model, directory, adapter_name="default", torch_device="cpu")


def state_dict_of_its_own(model, other, directory):
    weights = {key: value for key, value in other.state_dict().items() if "lora_" in key}
    hotswap_adapter_from_state_dict(model, weights, "default", other.peft_config["default"])


def compiled(model, other, directory):
    same_rank(torch.compile(model, backend="eager"), other, directory)


def a_copy(model, other, directory):
    same_rank(copy.deepcopy(model), other, directory)


def set_by_hand(model, other, directory):
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))


def loaded_into_a_part(model, other, directory):
    weights = {key.removeprefix("base_model."): value for key, value in other.state_dict().items()}
    model.base_model.load_state_dict(weights, strict=False)


@pytest.mark.parametrize(
    "write",
    [
        same_rank,
        smaller_rank,
        twice_the_rank,
        state_dict_of_its_own,
        compiled,
        a_copy,
        set_by_hand,
        loaded_into_a_part,
    ],
)
def test_stock_factors_are_not_written_over_dA_and_dB(write, trained, other, ids):
    before = logits(trained, ids)
    with pytest.raises(ValueError, match="load_adapter"):
        write(trained, *other)
    assert torch.equal(logits(trained, ids), before)


def test_a_pickled_layer_keeps_its_guard(trained):
    layer = pickle.loads(pickle.dumps(trained.base_model.model.model.layers[0].mlp.up_proj))
    half = {key: value for key, value in layer.state_dict().items() if "frozen_" not in key}
    with pytest.raises(ValueError, match="load_adapter"):
        layer.load_state_dict(half, strict=False)


def test_layers_padded_for_hotswap_say_what_happened(trained, ids):
    prepare_model_for_compiled_hotswap(trained, target_rank=8)
    with pytest.raises(ValueError, match="prepare_model_for_compiled_hotswap"):
        logits(trained, ids)


def test_the_remedy_is_one(trained, other, ids, tmp_path):
    stock_model, directory = other
    trained.load_adapter(directory, "other")
    trained.set_adapter("other")
    torch.testing.assert_close(logits(trained, ids), logits(stock_model.eval(), ids))
    same = tiny_llama()
    again = ba_lora(same)
    trained.set_adapter("default")
    trained.save_pretrained(tmp_path / "ours", selected_adapters=["default"])
    again.load_adapter(str(tmp_path / "ours"), "default")
    torch.testing.assert_close(logits(again.eval(), ids), logits(trained, ids))


def test_stock_adapters_beside_ours_are_swapped_as_ever(trained, other, ids):
    stock_model, directory = other
    trained.load_adapter(directory, "other")
    trained.set_adapter("other")
    hotswap_adapter(trained, directory, adapter_name="other", torch_device="cpu")
    set_peft_model_state_dict(trained, get_peft_model_state_dict(stock_model), adapter_name="other")
    torch.testing.assert_close(logits(trained, ids), logits(stock_model.eval(), ids))


def test_state_dicts_of_our_own_are_loaded(trained, ids):
    from balora_plugin.adapter.guard import native_factors

    whole = {key: value.clone() for key, value in trained.state_dict().items()}
    adapter = {key: value for key, value in whole.items() if "lora_" in key or "frozen_" in key}
    before = logits(trained, ids)
    for values in (whole, adapter):
        fresh = ba_lora(tiny_llama(), init_lora_weights="pissa_fast").eval()
        nn.Module.load_state_dict(fresh, values, strict=False)
        assert torch.equal(logits(fresh, ids), before)
    with native_factors():  # an engine's checkpoint of what trains
        result = set_peft_model_state_dict(trained, get_peft_model_state_dict(trained))
    assert not result.unexpected_keys and torch.equal(logits(trained, ids), before)
    assert isinstance(trained, PeftModel)
