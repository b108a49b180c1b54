"""Names that a config asks for and the model does not have: said with the nearest, refused where nothing is left."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import reads_experts
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
    return lambda: [r.getMessage() for r in caplog.records if " matches no" in r.getMessage()]


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
        ({"rank_pattern": {"q_prj": 4, "q_proj": 3}}, "rank_pattern: q_prj matches nothing in LlamaForCausalLM: did "
         "you mean q_proj?"),
        ({"alpha_pattern": {r"layers\.9\..*": 4}}, r"alpha_pattern: layers\.9\..* matches nothing in LlamaForCausal"
         "LM: there are down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj."),
        ({"rank_pattern": {"v_proj": 4}}, "rank_pattern: v_proj matches no target in LlamaForCausalLM: the targets are "
         "q_proj."),
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


@reads_experts
def test_what_peft_knows_by_an_older_name_matches(said):
    with torch.device("meta"):
        model = tiny_mixtral()
    for wanted in (["w1", "w2", "w3"], ["q_proj", "w2"], "all-linear"):
        check_names(config(target_modules=wanted), model)
    check_names(config(target_modules=["model.layers.0.self_attn.q_proj"], modules_to_save=["embed_tokens"]), model)
    assert not said()


@reads_experts
def test_patterns_that_match_are_not_spoken_of(said):
    patterns = {"q_proj": 3, r"layers\.0\.self_attn\.v_proj": 2, r".*\.up_.*": 2}
    get_ba_lora_model(tiny_llama(), config(target_modules="all-linear", rank_pattern=patterns, alpha_pattern=patterns))
    expression = r".*\.(q|v|up)_proj"
    get_ba_lora_model(tiny_llama(), config(target_modules=expression, rank_pattern=patterns))
    with torch.device("meta"):
        model = tiny_mixtral()
    targets = ["w1", "w3", "q_proj"]
    check_names(config(target_modules=targets, rank_pattern={r".*experts\.gate_up_proj": 4, "q_proj": 2}), model)
    assert not said()
    check_names(config(target_modules=targets, rank_pattern={"w1": 4}), model)  # which PEFT leaves as it is
    assert len(said()) == 1 and "rank_pattern: w1 matches nothing" in said()[0]


@reads_experts
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
