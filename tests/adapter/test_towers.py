"""What of a multimodal model is adapted: the language model, and its towers where they are named."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import ba_lora, stock
from models import tiny_llama
from multimodal import FAMILIES, tiny_multimodal
from peft import PeftModel

from balora_plugin import BaLoraConfig
from balora_plugin.pretrained.backbone import beside_the_language_model

pytestmark = pytest.mark.hosts

NAMES = ["q_proj", "v_proj"]
LEFT = "stay as they are"


def adapted(model):
    """Names in the base model of the layers with an adapter."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if getattr(module, "lora_A", None)
    }


def in_towers(names):
    return {name for name in names if "vision" in name or "projector" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_outside_the_language_model_and_the_head_is_a_tower(family):
    model = tiny_multimodal(family)
    towers = beside_the_language_model(model)
    inside = [p for name, p in model.named_parameters() if name.startswith(tuple(f"{t}." for t in towers))]
    text = [*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()]
    assert inside
    assert {id(p) for p in [*inside, *text]} == {id(p) for p in model.parameters()}
    assert not {id(p) for p in inside} & {id(p) for p in text}


@pytest.mark.parametrize("targets", ["all-linear", NAMES])
@pytest.mark.parametrize("family", ["gemma3", "mllama"])  # whose projector is one layer
def test_names_found_in_both_mean_the_language_model(family, targets, caplog, tmp_path):
    base = tiny_multimodal(family)
    assert in_towers(adapted(stock(copy.deepcopy(base), r=2, targets=targets)))
    model = ba_lora(copy.deepcopy(base), r=2, targets=targets)
    found = adapted(model)
    assert found
    assert not in_towers(found)
    said = [record.getMessage() for record in caplog.records if LEFT in record.getMessage()]
    assert len(said) == 1
    assert "model.vision" in said[0]
    model.save_pretrained(tmp_path)
    assert adapted(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)) == found
    again = ba_lora(
        copy.deepcopy(base), r=2, targets=targets, exclude_modules=model.peft_config["default"].exclude_modules
    )
    assert adapted(again) == found
    assert again.peft_config["default"].exclude_modules == model.peft_config["default"].exclude_modules


@pytest.mark.parametrize("start", ["model.vision_tower.encoder.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"])
def test_a_longer_name_of_a_tower_beside_a_short_one_asks_for_its_layer(start, caplog, tmp_path):
    """What the line about the others says to write; a name that the language model has too asks for nothing more."""
    base = tiny_multimodal("llava")
    model = ba_lora(copy.deepcopy(base), r=2, targets=["q_proj", start])
    found = adapted(model)
    assert len(found - in_towers(found)) == 2
    assert in_towers(found) == ({start} if "vision" in start else set())
    said = [record.getMessage() for record in caplog.records if LEFT in record.getMessage()]
    assert f"{1 if 'vision' in start else 2} layers of model.vision_tower" in said[0]
    model.save_pretrained(tmp_path)
    assert adapted(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)) == found


def test_a_regular_expression_and_names_of_a_tower_alone_ask_for_it(caplog):
    regex = adapted(ba_lora(tiny_multimodal("gemma3"), r=2, targets=r".*\.(q_proj|linear_1)"))
    names = adapted(ba_lora(tiny_multimodal("gemma3"), r=2, targets=["q_proj", "fc1"]))
    full = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    one = adapted(ba_lora(tiny_multimodal("gemma3"), r=2, targets=["v_proj", full]))
    assert full in regex
    assert {name.rpartition(".")[2] for name in in_towers(names)} == {"fc1"}
    assert in_towers(one) == {full}
    assert any(name.endswith("language_model.layers.0.self_attn.v_proj") for name in one)


def test_what_a_user_leaves_out_stays_out():
    kept = adapted(
        ba_lora(tiny_multimodal("gemma3"), r=2, targets=NAMES, exclude_modules=["layers.1.self_attn.q_proj"])
    )
    assert kept == {
        f"model.language_model.layers.{i}.self_attn.{n}" for i, n in [(0, "q_proj"), (0, "v_proj"), (1, "v_proj")]
    }


def test_a_second_adapter_and_a_projector_that_trains_whole():
    model = ba_lora(tiny_multimodal("llava"), r=2, targets=NAMES, modules_to_save=["multi_modal_projector"])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("multi_modal_projector.modules_to_save.default.linear_1.weight") for name in trains)
    model.add_adapter("two", BaLoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    assert not in_towers(adapted(model))


def test_text_models_are_left_as_they_are(caplog):
    model = ba_lora(tiny_llama())
    assert model.peft_config["default"].exclude_modules is None
    assert LEFT not in caplog.text
    assert torch.is_tensor(model.get_base_model().lm_head.weight)
