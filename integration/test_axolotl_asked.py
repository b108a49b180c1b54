"""What a YAML's `peft:` block, other plug-ins and experts' kernels ask of the adapter: it has it, or it is refused."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest

pytest.importorskip("axolotl")
from axolotl.cli.config import load_cfg
from axolotl.cli.utils import load_model_and_tokenizer
from axolotl.integrations.base import BasePlugin
from models import tiny_mixtral

from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin

KERNELS_PLUGIN = "axolotl.integrations.kernels.KernelsPlugin"


class Asks(BasePlugin):
    """Another plug-in that has something to say of the adapter."""

    options: ClassVar[dict] = {}

    def get_lora_config_kwargs(self, cfg):
        return self.options


@pytest.fixture
def asking(written, monkeypatch):
    """Writes a YAML with that plug-in, which asks for the given options."""

    def write(options, **changes):
        monkeypatch.setattr(Asks, "options", options)
        return written(plugins=["balora_plugin.BaLoraPlugin", "integration.test_axolotl_asked.Asks"], **changes)

    return write


@pytest.mark.parametrize("adapter", ["ba_lora", "lora"])
@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"loftq_config": {"loftq_bits": 4}}, "peft.loftq_config: {'loftq_bits': 4} is a start that BA-LoRA does not"),
        ({"loftq_config": {}, "use_dora": True}, "peft.use_dora: true is not read by Axolotl"),
        ({"lora_bias": "all"}, "peft.lora_bias: 'all' is not read by Axolotl"),
    ],
)
def test_what_stands_under_peft_is_refused_by_name(block, words, adapter, written):
    terms = {} if adapter == "ba_lora" else {"ba_lora": {"apply_to": "lora"}}
    with pytest.raises(ValueError, match=re.escape(words)):
        load_cfg(str(written(peft=block, adapter=adapter, **terms)))


def test_an_empty_peft_block_is_none(written):
    load_cfg(str(written(peft={"loftq_config": None})))


def test_a_final_config_with_loftq_is_refused_too(written):
    cfg = load_cfg(str(written()))
    cfg.peft = {"loftq_config": {"loftq_bits": 4}}
    with pytest.raises(ValueError, match=r"peft\.loftq_config"):
        BaLoraPlugin().pre_model_load(cfg)


def test_other_plugins_options_reach_the_adapter(asking):
    path = asking({"rank_pattern": {"q_proj": 2}, "lora_dropout": 0.25}, lora_dropout=0.5)
    model, _, _ = load_model_and_tokenizer(cfg=load_cfg(str(path)))
    config = model.peft_config["default"]
    assert config.rank_pattern == {"q_proj": 2} and config.lora_dropout == 0.25
    layer = model.get_base_model().model.layers[0].self_attn
    assert (layer.q_proj.lora_A["default"].out_features, layer.k_proj.lora_A["default"].out_features) == (2, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_mora": True}, "Asks asks for an adapter with use_mora=True, which BA-LoRA does not have"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' is not a BA-LoRA start"),
        ({"use_dora": True}, "use_dora=True"),
    ],
)
def test_options_that_the_adapter_cannot_have_are_refused_before_the_model_loads(options, words, asking):
    cfg = load_cfg(str(asking(options)))
    with pytest.raises(ValueError, match=re.escape(words)):
        BaLoraPlugin().pre_model_load(cfg)


def test_experts_that_peft_targets_by_their_old_names_count_too(written, tmp_path, workspace):
    """w1, w2 and w3 of a Mixtral are target_parameters by the time the adapter is injected."""
    import shutil

    tiny_mixtral().save_pretrained(tmp_path / "moe")
    for file in (workspace / "base").glob("*token*"):
        shutil.copy(file, tmp_path / "moe")
    path = written(
        base_model=str(tmp_path / "moe"), lora_target_linear=None, lora_target_modules=["q_proj", "w1", "w3"]
    )
    cfg = load_cfg(str(path))
    plugin = BaLoraPlugin()
    model, _ = plugin._load(tiny_mixtral(), cfg, False, False)
    assert model.peft_config["default"].target_parameters
    cfg.use_scattermoe = True
    with pytest.raises(ValueError, match="use_scattermoe: true with lora_target_parameters"):
        plugin._load(tiny_mixtral(), cfg, False, False)
