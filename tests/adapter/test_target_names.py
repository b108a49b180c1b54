"""Names that a config asks for and the model does not have: said with the nearest, refused where nothing is left."""

from __future__ import annotations

import logging

import pytest
import torch
from models import tiny_llama, tiny_mixtral
from transformers.utils import logging as hf_logging

from balora_plugin import BaLoraConfig, get_ba_lora_model
from balora_plugin.adapter.target_names import check_names

pytestmark = pytest.mark.hosts


@pytest.fixture
def said(caplog, monkeypatch):
    hf_logging.get_logger("x").warning_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("balora_plugin"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if "matches nothing" in r.getMessage()]


def config(**changes):
    return BaLoraConfig(**{"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **changes})


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"target_modules": ["q_proj", "q_prj"]}, "target_modules: q_prj matches nothing in LlamaForCausalLM: did you "
         "mean q_proj?"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save: lm_haed matches nothing in LlamaForCausalLM: did you mean "
         "lm_head?"),
        ({"target_parameters": ["experts.down"]}, "target_parameters: experts.down matches nothing in "
         "LlamaForCausalLM: remove it."),
    ],
)  # fmt: skip
def test_one_of_several_is_said_once(wanted, sentence, said):
    get_ba_lora_model(tiny_llama(), config(**wanted))
    get_ba_lora_model(tiny_llama(), config(**wanted))
    assert said() == [f"BA-LoRA: {sentence}"]


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (["q_prj", "v_prj"], "target_modules: q_prj, v_prj matches nothing .*: did you mean q_proj, v_proj\\?$"),
        (["zzz"], "target_modules: zzz matches nothing .*: there are .*q_proj"),
        (r".*\.q_prj", "matches nothing"),
    ],
)
def test_nothing_left_is_refused(wanted, sentence):
    with pytest.raises(ValueError, match=sentence):
        get_ba_lora_model(tiny_llama(), config(target_modules=wanted))


def test_what_peft_knows_by_an_older_name_matches(said):
    with torch.device("meta"):
        model = tiny_mixtral()
    for wanted in (["w1", "w2", "w3"], ["q_proj", "w2"], "all-linear"):
        check_names(config(target_modules=wanted), model)
    check_names(config(target_modules=["model.layers.0.self_attn.q_proj"], modules_to_save=["embed_tokens"]), model)
    assert not said()


def test_a_second_adapter_finds_the_names_of_the_model_as_it_was(said):
    experts = config(target_modules=None, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = get_ba_lora_model(tiny_mixtral(), experts)
    model.add_adapter("second", experts)
    assert not said()
    with pytest.raises(
        ValueError, match=r"zzz matches nothing .*: there are (?!.*(base_layer|default|lora_A)).*q_proj"
    ):
        model.add_adapter("third", config(target_modules=["zzz"]))


def test_trl_looks_them_up_before_weights_are_read(tmp_path):
    pytest.importorskip("trl")
    from balora_plugin import BaLoraSFTTrainer

    tiny_llama().config.save_pretrained(tmp_path)  # no weights
    with pytest.raises(ValueError, match=r"^target_modules: q_prj matches nothing in LlamaForCausalLM"):
        BaLoraSFTTrainer(tmp_path, peft_config=config(target_modules=["q_prj"]))
