"""Packed batches in Axolotl: the terms of the same samples unpacked; flash attention that cannot run here."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("axolotl")

from attention_kernels import install_reference_flash_attention, watched
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import setup_model_and_trainer
from axolotl.utils.dict import DictDefault
from packing import assert_same_terms, documents, leak, move

from balora_plugin.hosts.axolotl import engine
from balora_plugin.hosts.axolotl.engine import attention_here
from balora_plugin.hosts.axolotl.errors import SettingError
from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin

from .axolotl_run import history, run

PACKED = {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 1}


def set_up(path):
    """Axolotl's trainer for a YAML, its model in float64 and away from its start, and its collator's batches."""
    cfg = load_cfg(str(path))
    trainer = setup_model_and_trainer(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))[0]
    move(trainer.model.double())
    return trainer, [dict(batch) for batch in trainer.get_train_dataloader()]


def test_the_terms_are_those_of_the_same_samples_unpacked(written, monkeypatch):
    """Prompts counted too: Axolotl counts a document's first token after the one before it, which no sample alone does.

    By SDPA, and by FlashAttention's functions written with PyTorch's.
    """
    shared = {"sequence_len": 768, "train_on_inputs": True, "attn_implementation": "sdpa"}
    trainer, packed = set_up(written(**shared, **PACKED))
    _, padded = set_up(written(**shared, micro_batch_size=4))
    assert all(len(batch["input_ids"]) == 1 and "attention_mask" not in batch for batch in packed)
    several = next(batch for batch in packed if len(documents(batch)) > 2)
    assert all(several["labels"][0, start] != -100 for _, start, _ in documents(several))  # as the host has it
    _, count = trainer.get_batch_samples(iter(packed), len(packed), torch.device("cpu"))
    assert int(count) == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in padded)
    model, several = trainer.model, trainer.ba_lora_run.inputs(several)
    packed, padded = ([trainer.ba_lora_run.inputs(batch) for batch in batches] for batches in (packed, padded))
    assert_same_terms(model, packed, padded, 1e-10)
    assert leak(model, several) < 1e-12
    install_reference_flash_attention(monkeypatch)
    model.config._attn_implementation = "flash_attention_2"  # Axolotl itself would look for a GPU
    with watched("flash_attention_2") as calls:
        assert_same_terms(model, packed, padded, 1e-10)
        assert leak(model, several) < 1e-12
    assert calls
    assert leak(model, {**several, "position_ids": None}, documents(several)) > 0.1  # as where they see each other


def test_anchors_in_packed_rows(written, tmp_path):
    """From the YAML's block, at the length of its rows, as documents behind a packed row's."""
    path = tmp_path / "anchors.txt"
    path.write_text("\n\n".join(f"Anchor {i} says little" + " at all" * 40 * (i == 3) for i in range(9)))
    block = {"lambda_consistency": 0.5, "anchor_data": str(path), "anchor_fraction": 1.0}
    trainer = run(written(ba_lora=block, attn_implementation="sdpa", **PACKED))
    assert len(history(trainer, "balora/anchor_consistency")) == trainer.state.max_steps
    assert history(trainer, "balora/anchor_consistency")[-1] > 1e-5
    anchors = trainer.ba_lora_run.anchors
    assert max(map(len, [*anchors._trained, *anchors._evaluated])) == 256  # sequence_len


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"flash_attention": True, "bf16": "auto", "fp16": None}, "flash_attention: true"),
        ({"attn_implementation": "flash_attention_3", "fp16": True}, "attn_implementation: flash_attention_3"),
    ],
)
def test_flash_attention_without_a_gpu_is_refused_in_the_yamls_words(changes, setting, written, monkeypatch):
    """Before the model loads, not when the YAML is read: data may be prepared on another machine."""
    monkeypatch.setattr("balora_plugin.pretrained.attention.accelerator", lambda: None)
    cfg = load_cfg(str(written(**changes)))
    plugin = next(p for p in _plugins() if isinstance(p, BaLoraPlugin))
    with pytest.raises(ValueError, match=rf"^{setting} needs a GPU, and there is none here: write attn_impl"):
        plugin.pre_model_load(cfg)


def _plugins():
    from axolotl.integrations.base import PluginManager

    return PluginManager.get_instance().plugins.values()


def test_flash_attention_in_the_precision_of_the_final_config(monkeypatch):
    """bf16: auto on a GPU that has none, and fp16: false."""
    monkeypatch.setattr("balora_plugin.pretrained.attention.accelerator", lambda: "xpu")
    setting, cfg = "flash_attention: true", {"attn_implementation": "flash_attention_2", "torch_dtype": torch.float32}
    (found,) = attention_here(cfg, setting)
    assert str(found).startswith("flash_attention: true needs half precision: write bf16: true")
    assert not list(attention_here({**cfg, "torch_dtype": torch.bfloat16}, setting))


@pytest.mark.parametrize("changes", [{"bf16": True}, {"bf16": False}, {"bf16": "auto", "relora": True}], ids=str)
def test_flash_attention_without_a_gpu_is_refused_at_once(changes, monkeypatch):
    """What is refused for something else names it too. Written as they are told to, no line is refused any more."""
    monkeypatch.setattr(engine, "accelerator", lambda: None)
    monkeypatch.setattr("balora_plugin.pretrained.attention.accelerator", lambda: None)
    values = {"adapter": "ba_lora", "lora_r": 4, "lora_alpha": 4, "lora_target_linear": True, "flash_attention": True}
    values |= changes
    with pytest.raises(
        SettingError, match=r"flash_attention: true needs a GPU, .*write attn_implementation: sdpa"
    ) as no:
        BaLoraPlugin().register(DictDefault(values))
    other = {"bf16": True, "relora": True}.items() & changes.items()
    assert [finding.key for finding in no.value.findings] == ["flash_attention", *(key for key, _ in other)]
    for elsewhere in ("is_preprocess", "use_ray"):
        assert not list(engine.flash_at_once({**values, elsewhere: True}, refused=True))
    BaLoraPlugin().register(DictDefault({**values, "flash_attention": None, "bf16": False, "relora": None}))
