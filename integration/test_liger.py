"""Liger's kernels: of the layers they are used and leave forward, terms and head check right; its losses are off.

The kernels themselves need a GPU: here the functions behind them are PyTorch's.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers.integrations.liger as integration
import transformers.trainer as host_module
from datasets import Dataset
from models import character_tokenizer, tiny_llama
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, BaLoraTrainer, RegularizerConfig
from balora_plugin.pretrained.lm_head import check_head

TERMS = {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02}


def trainer(host, tmp_path, *, liger, settings=None, **extra):
    """A trainer of a tiny model on eight short rows, evaluated on four of them."""
    values = {"output_dir": str(tmp_path / f"out-{liger}"), "max_steps": 2, "per_device_train_batch_size": 2}
    values |= {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    values |= {"use_liger_kernel": liger, "liger_kernel_config": settings, "prediction_loss_only": True, "seed": 3}
    tokenizer = character_tokenizer()
    rows = [tokenizer(f"The number {i} comes before {i + 1}")["input_ids"] for i in range(8)]
    data = Dataset.from_list([{"input_ids": row, "labels": list(row)} for row in rows])
    adapter = BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", regularizers=RegularizerConfig(**TERMS))
    extra |= {"train_dataset": data, "eval_dataset": data.select(range(4)), "peft_config": adapter}
    if host == "transformers":
        collator = DataCollatorForSeq2Seq(tokenizer)
        return BaLoraTrainer(model=tiny_llama(), args=TrainingArguments(**values), data_collator=collator, **extra)
    from trl import SFTConfig

    args = SFTConfig(**values, bf16=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
    return BaLoraSFTTrainer(model=tiny_llama(), args=args, processing_class=tokenizer, **extra)


@pytest.fixture
def applied(monkeypatch):
    """What a trainer asks Liger for, in a list; nothing is patched."""
    asked = []
    for module in (host_module, integration):
        monkeypatch.setattr(module, "apply_liger_kernel", lambda model, config: asked.append((model, config)))
    return asked


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("host", ["transformers", "trl"])
def test_the_losses_are_off_and_what_is_trained_is_the_same(host, tmp_path, applied):
    stock = trainer(host, tmp_path, liger=False)
    stock.train()
    ours = trainer(host, tmp_path, liger=True, settings={"cross_entropy": True, "rope": False})
    ours.train()
    assert [config for _, config in applied] == [
        {"fused_linear_cross_entropy": False, "cross_entropy": False, "rope": False}
    ]
    assert "liger" in ours.ba_lora_run.warn.said
    assert stock.evaluate()["eval_loss"] == ours.evaluate()["eval_loss"]
    logs = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (stock, ours)]
    assert len(logs[0]) == 2 and logs[0] == logs[1]


def test_the_callers_arguments_stay_as_they_are_and_the_teacher_has_the_same_kernels(tmp_path, applied):
    args = TrainingArguments(
        str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to=[], liger_kernel_config={"rope": False}
    )
    teacher = tiny_llama()
    ours = BaLoraTrainer(model=tiny_llama(), args=args, teacher_model=teacher, regularizers=RegularizerConfig(**TERMS))
    assert args.liger_kernel_config == {"rope": False}
    off = {"rope": False, "fused_linear_cross_entropy": False, "cross_entropy": False}
    assert ours.args.liger_kernel_config == off
    assert [(model is teacher, config) for model, config in applied] == [(True, off)]


def reference_norm(x, weight, eps, *_):
    """What Liger's norm computes for Llama."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def test_ligers_norms_leave_our_forward_and_the_head_check_right(tmp_path, monkeypatch, llama_code):
    pytest.importorskip("liger_kernel")
    norms = importlib.import_module("liger_kernel.transformers.rms_norm")
    monkeypatch.setattr(norms, "LigerRMSNormFunction", SimpleNamespace(apply=reference_norm))
    stock = trainer("transformers", tmp_path, liger=False)
    stock.train()
    ours = trainer("transformers", tmp_path, liger=True, settings={"rope": False, "swiglu": False})
    forward = ours.model.get_base_model().forward
    ours.train()
    base = ours.model.get_base_model()
    assert base.forward == forward  # Liger's fused loss would have put its own there
    norm = base.model.norm
    assert norm.forward.__func__ is norms.LigerRMSNorm.forward  # it is applied
    check_head(base)
    for key in ("loss", "balora/consistency", "balora/diversity", "balora/svd"):
        logs = [[row[key] for row in each.state.log_history if key in row] for each in (stock, ours)]
        assert len(logs[0]) == 2
        torch.testing.assert_close(logs[0], logs[1], rtol=1e-5, atol=1e-7)
