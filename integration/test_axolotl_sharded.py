"""Axolotl under FSDP2: two gloo ranks train what one process trains, save whole adapters, resume and merge."""

from __future__ import annotations

import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import logits
from models import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

pytest.importorskip("axolotl")

from axolotl import train as axolotl_train
from axolotl.cli.config import load_cfg
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.expert_parallel import shard
from axolotl.utils.dict import DictDefault
from transformers import AutoModelForCausalLM

from balora_plugin import BaLoraConfig, get_ba_lora_model
from balora_plugin.hosts.axolotl import fsdp
from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin

from .axolotl_run import history, run
from .test_axolotl_ranks import RUN, launch

PLUGINS = ["balora_plugin.BaLoraPlugin", "integration.axolotl_ranks.CpuShardsPlugin"]
LAYERS = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
SHARDED = {
    **LAYERS,
    "cpu_ram_efficient_loading": True,  # the second rank has no weights to factorise
    "activation_checkpointing": True,
    "reshard_after_forward": True,
    "state_dict_type": "SHARDED_STATE_DICT",
}
QUANTISED = {**LAYERS, "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"}
WHOLE = ("adapter_model.safetensors", "ba_lora_init.safetensors", "ba_lora.json")


def losses(log):
    keys = ("loss", "balora/task", "balora/consistency", "balora/diversity", "balora/svd", "balora/loss")
    return {key: [row[key] for row in log if key in row] for key in keys}


def settings(config, output):
    # torch loads no optimizer state that is empty, as SGD's is; Adam with an epsilon goes with the gradient
    adam = {"optimizer": "adamw_torch", "adam_epsilon": 1.0, "weight_decay": 0.0}
    return {**RUN, **adam, "plugins": PLUGINS, "fsdp_version": 2, "fsdp_config": config, "output_dir": str(output)}


def alone(settings, output):
    without = {"plugins": PLUGINS[:1], "fsdp_version": None, "fsdp_config": None}
    return {**settings, **without, "gradient_accumulation_steps": 2, "output_dir": str(output)}


def check_same(written, tmp_path, config, **changes):
    """Two ranks against one process: terms and the final adapter; returns what the ranks noted."""
    both = {**settings(config, tmp_path / "both"), **changes}
    ranks = launch(written(**both))
    assert ranks[0]["written"] == ["checkpoint-2", "checkpoint-4", "both"]
    assert ranks[1]["written"] == []
    one = run(written(**alone(both, tmp_path / "alone")))
    found = losses(ranks[0]["log"])
    assert found["balora/consistency"][0] == 0 < found["balora/consistency"][1]
    for key, values in found.items():
        assert values == pytest.approx(history(one, key), rel=1e-5, abs=1e-6), key
    files = [load_file(tmp_path / name / WHOLE[0]) for name in ("alone", "both")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        torch.testing.assert_close(files[1][key], value, rtol=0, atol=1e-6)
    for directory in (tmp_path / "both", tmp_path / "both" / "checkpoint-4"):
        assert all((directory / name).is_file() for name in WHOLE)
    return found


@pytest.mark.slow
def test_sharded_ranks_train_save_resume_and_merge_as_one_process(written, tmp_path, ids):
    found = check_same(written, tmp_path, SHARDED)
    checkpoint = str(tmp_path / "both" / "checkpoint-2")
    resumed = launch(written(**settings(SHARDED, tmp_path / "resumed"), resume_from_checkpoint=checkpoint))
    assert losses(resumed[0]["log"]) == found
    whole, again = (load_file(tmp_path / name / WHOLE[0]) for name in ("both", "resumed"))
    assert all(torch.equal(again[key], value) for key, value in whole.items())

    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both").eval()
    trained = {**settings(SHARDED, tmp_path / "both"), "plugins": PLUGINS[:1]}
    merge_lora(str(written(**trained)), lora_model_dir=str(tmp_path / "both"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "both" / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, ids), logits(stock, ids), rtol=0, atol=1e-4)


@pytest.mark.long
def test_a_quantised_base_may_be_sharded(written, tmp_path):
    pytest.importorskip("bitsandbytes")
    check_same(written, tmp_path, QUANTISED, load_in_4bit=True)


def test_axolotls_writer_leaves_our_models_to_the_trainer(tmp_path):
    ours = get_ba_lora_model(tiny_llama(), BaLoraConfig(r=2, target_modules=["q_proj"]))
    other = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    theirs = shard.save_fsdp2_lora_adapter
    try:
        fsdp.save_by_the_trainer(ours)
        assert shard.save_fsdp2_lora_adapter(ours, str(tmp_path / "ours")) is False
        assert not (tmp_path / "ours").exists()
        assert shard.save_fsdp2_lora_adapter(other, str(tmp_path / "other")) is True
        assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    finally:
        shard.save_fsdp2_lora_adapter = theirs


def test_axolotl_calls_the_writer_as_we_think():
    """By its name in its module, at each save; where it has not saved, the trainer does."""
    for caller in (axolotl_train.save_trained_model, AxolotlTrainer._save_fsdp2_quantized_lora_adapter):
        source = inspect.getsource(caller)
        assert "expert_parallel.shard import" in source and "save_fsdp2_lora_adapter(" in source
    assert "trainer.save_model(cfg.output_dir)" in inspect.getsource(axolotl_train.save_trained_model)


@pytest.mark.parametrize("lost", ["function", "module"])
def test_an_axolotl_without_that_writer_is_refused(lost, monkeypatch):
    if lost == "function":
        monkeypatch.delattr(shard, "save_fsdp2_lora_adapter")
    else:  # the plug-in itself is imported without it
        monkeypatch.setitem(sys.modules, shard.__name__, None)
        importlib.reload(fsdp)
    with pytest.raises(ImportError, match=r"has no save_fsdp2_lora_adapter.*DDP and DeepSpeed work"):
        fsdp.save_by_the_trainer(tiny_llama())


@pytest.mark.parametrize("by_yaml", [True, False])
def test_fsdp_by_accelerates_own_config_is_saved_by_the_trainer_too(by_yaml, monkeypatch):
    kept = []
    monkeypatch.setattr(fsdp, "save_by_the_trainer", kept.append)
    cfg = DictDefault(adapter="ba_lora", fsdp_version=2, **({"fsdp_config": LAYERS} if by_yaml else {}))
    trainer = SimpleNamespace(model="the model", is_fsdp_enabled=not by_yaml, ba_lora="its terms")
    BaLoraPlugin().post_trainer_create(cfg, trainer)
    trainer.is_fsdp_enabled = False
    BaLoraPlugin().post_trainer_create(DictDefault(adapter="ba_lora"), trainer)
    assert kept == ["the model"]


@pytest.mark.parametrize(("final", "checkpoints"), [(None, "SHARDED_STATE_DICT"), ("SHARDED_STATE_DICT", None)])
def test_the_final_adapter_is_not_merged_from_shards(final, checkpoints):
    cfg = DictDefault(fsdp_config={"final_state_dict_type": final, "state_dict_type": checkpoints})
    fsdp.save_whole(cfg)
    assert cfg.fsdp_config.final_state_dict_type == "FULL_STATE_DICT"
    assert cfg.fsdp_config.state_dict_type == checkpoints


CLASSIFIER = {"model_type": "AutoModelForSequenceClassification", "num_labels": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fsdp_version": 2, "fsdp_config": {"state_dict_type": "LOCAL_STATE_DICT"}}, "write SHARDED_STATE_DICT or"),
        ({"fsdp_config": LAYERS, **CLASSIFIER, "datasets": [{"path": "x"}]}, "write fsdp_version: 2"),
    ],
)
def test_what_no_adapter_could_be_saved_with_is_refused(changes, words, written):
    with pytest.raises(ValueError, match=words):
        load_cfg(str(written(**changes)))
