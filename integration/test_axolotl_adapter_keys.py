"""Keys of the adapter that Axolotl ignores: a misspelt one, PEFT's own name of one, and one that its schema forgot."""

from __future__ import annotations

import pytest

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from balora_plugin.hosts.axolotl import checks
from balora_plugin.hosts.axolotl.errors import SettingError

LORA = {"adapter": "ba_lora", "lora_r": 4, "lora_alpha": 4, "lora_target_modules": ["q_proj"]}
MEANT = {
    "lora_rank": "lora_r",
    "lora_R": "lora_r",
    "lora-alpha": "lora_alpha",
    "lora_target_module": "lora_target_modules",
    "lora_targets": "lora_target_modules",
    "lora_use_rslora": "peft_use_rslora",
    "lora_init_lora_weights": "peft_init_lora_weights",
    "peft_init_weights": "peft_init_lora_weights",
    "peft_target_parameters": "lora_target_parameters",
    "lora_droput": "lora_dropout",
    "lora_plus_lr_ratio": "loraplus_lr_ratio",
    "r": "lora_r",
    "rank": "lora_r",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "peft_use_rslora",
    "alpha_pattern": "lora_alpha_pattern",
}


@pytest.mark.parametrize("key", MEANT)
def test_a_key_that_axolotl_ignores_is_named_with_the_one_it_means(key):
    with pytest.raises(SettingError) as caught:
        checks.check_raw({**LORA, key: 8})
    (finding,) = caught.value.findings
    assert finding.key == key and finding.remedy == f"did you mean {MEANT[key]}?"


def test_a_key_that_none_is_near_is_named_too():
    with pytest.raises(SettingError, match=r"lora_zzz: 3 is not a key of Axolotl, which ignores it: remove it\."):
        checks.check_raw({**LORA, "lora_zzz": 3})


class _Args(BaseModel):
    lora_of_theirs: int | None = None


class BringsAKey(BasePlugin):
    def get_input_args(self):
        return f"{__name__}._Args"


def test_what_acts_or_does_nothing_is_not_accused():
    plugins = ["balora_plugin.BaLoraPlugin", f"{__name__}.BringsAKey"]
    for fine in (
        {"lora_of_theirs": 3},
        {"lora_bias": None, "peft_use_qalora": False, "some_anchor": {"lora_rank": 3}, "bias": "none", "revision": "x"},
        {"lora_mine": {"lora_r": 4}},
        {"lora_on_cpu": True, "loraplus_lr_ratio": 16, "lora_exclude_modules": ["down_proj"]},
    ):
        checks.check_raw({**LORA, **fine, "plugins": plugins})


def test_keys_of_a_plugin_that_does_not_load_are_not_accused():
    """What is wrong there Axolotl says itself, when it loads the plug-in."""
    checks.check_raw({**LORA, "lora_of_theirs": 3, "plugins": ["balora_plugin.BaLoraPlugin", "not.installed.Plugin"]})


def test_layers_that_a_yaml_leaves_out_reach_the_adapter(written):
    """Axolotl reads `lora_exclude_modules`, which its own schema drops."""
    assert load_cfg(str(written(lora_exclude_modules=["v_proj"]))).lora_exclude_modules == ["v_proj"]


def test_targets_that_the_base_does_not_have_are_found_by_its_config(written, workspace, caplog):
    """Before its weights are read: all of them is an error of the YAML, one of several is said."""
    sentence = r"^lora_target_modules: q_prj matches nothing in LlamaForCausalLM: did you mean q_proj\?$"
    with pytest.raises(SettingError, match=sentence):
        load_cfg(str(written(lora_target_linear=None, lora_target_modules=["q_prj"])))
    caplog.clear()
    load_cfg(str(written(lora_target_linear=None, lora_target_modules=["v_proj", "v_prj"])))
    assert [r.getMessage() for r in caplog.records if "matches nothing" in r.getMessage()] == [
        "BA-LoRA: target_modules: v_prj matches nothing in LlamaForCausalLM: did you mean v_proj?"
    ]
