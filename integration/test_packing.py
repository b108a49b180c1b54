"""Packed and padding-free batches in TRL: the terms of the same samples unpacked, by every attention kernel."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from attention_kernels import install_reference_flash_attention, watched
from datasets import Dataset
from helpers import TERMS, fresh
from models import tiny_llama
from packing import assert_same_terms, documents, leak, move, step
from torch._dynamo.backends.debugging import aot_eager
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer
from balora_plugin.compile import backend
from balora_plugin.training.packing_probe import PackingProbe

ROWS = [{"prompt": f"What is {i} + {i}? ", "completion": f"It is {2 * i}" + " ok" * (i % 3)} for i in range(5)]
KERNELS = {"sdpa": 1e-10, "eager": 1e-5, "flash_attention_2": 1e-10}  # tolerances: eager's softmax is float32
ARRANGEMENTS = {"packing": {"packing": True, "max_length": 256}, "padding_free": {"padding_free": True}}


def batches(tmp_path, tokenizer, model=None, compile=False, **changes):
    """A trainer on a float64 model, and its training batches."""
    values = {"output_dir": str(tmp_path), "per_device_train_batch_size": 3, "max_length": None, "report_to": []}
    values |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", regularizers=TERMS, compile=compile)
    trainer = BaLoraSFTTrainer(
        model=tiny_llama().double() if model is None else model,
        args=SFTConfig(**{**values, **changes}),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=config,
    )
    return trainer, [trainer.ba_lora_run.inputs(dict(batch)) for batch in trainer.get_train_dataloader()]


def use(model, kernel, monkeypatch):
    """Another attention implementation for a model that runs on a CPU."""
    if kernel == "flash_attention_2":
        install_reference_flash_attention(monkeypatch)
        model.config._attn_implementation = kernel  # set_attn_implementation() would look for a GPU
    else:
        model.get_base_model().set_attn_implementation(kernel)
    return model


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_terms_are_those_of_the_same_samples_unpacked(kernel, arrangement, tmp_path, tokenizer, monkeypatch):
    """Sums of each term for each document, and gradients; no document sees another, in the teacher's pass neither."""
    trainer, packed = batches(tmp_path, tokenizer, **ARRANGEMENTS[arrangement])
    _, padded = batches(tmp_path, tokenizer)
    assert all("attention_mask" not in batch and len(batch["input_ids"]) == 1 for batch in packed)
    assert any(not batch["attention_mask"].all() for batch in padded)
    model = use(move(trainer.model), kernel, monkeypatch)
    with watched("sdpa" if kernel == "eager" else kernel) as calls:  # eager is in no table
        assert_same_terms(model, packed, padded, KERNELS[kernel])
        several = next(batch for batch in packed if len(documents(batch)) > 1)
        assert leak(model, several) < 1e-12
    assert bool(calls) == (kernel != "eager")
    boundaries = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
    blind = {key: value for key, value in several.items() if key not in boundaries}
    assert leak(model, blind, documents(several)) > 0.1  # as where they see each other


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2"])
def test_teacher_and_student_attend_by_the_same_kernel(kernel, tmp_path, tokenizer, monkeypatch):
    """Once each in every layer: without gradients, then with them."""
    trainer, packed = batches(tmp_path, tokenizer, packing=True, max_length=256)
    model = use(trainer.model.train(), kernel, monkeypatch)
    others = {"sdpa", "flash_attention_2"} - {kernel}
    with watched(kernel) as calls, watched(others.pop()) as never:
        out = step(model, packed[0])
    assert calls == [False, False, True, True]
    assert not never
    assert out.consistency.item() == 0.0


def test_a_second_model_as_teacher_attends_by_the_same_kernel(tmp_path, tokenizer):
    base = tiny_llama(attn_implementation="sdpa")
    teacher = fresh(base)
    teacher.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"teacher_model attends by 'eager', the model by 'sdpa': call teacher_model"):
        BaLoraSFTTrainer(
            model=base,
            args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[]),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=copy.deepcopy(tokenizer),
            regularizers=TERMS,
            teacher_model=teacher,
        )


@pytest.mark.long
def test_flash_attention_in_compiled_graphs(tmp_path, tokenizer, monkeypatch):
    """Packed rows compile whole, teacher and student; without inductor below, whose C++ takes most of a minute."""
    lowered = []

    def lower(module, inputs, options):
        lowered.append(module)
        return aot_eager(module, inputs)

    monkeypatch.setattr(backend, "lower", lower)
    torch._dynamo.reset()
    losses = []
    for kernel, compiled in (("sdpa", False), ("flash_attention_2", True)):
        trainer, _ = batches(
            tmp_path,
            tokenizer,
            tiny_llama(num_hidden_layers=1).double(),
            compile=compiled,
            packing=True,
            max_length=64,
            max_steps=3,
            logging_steps=1,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
        )
        use(trainer.model, kernel, monkeypatch)
        trainer.train()
        assert "compile" not in trainer.ba_lora_run.warn.said  # it did not fall back
        losses.append([row[key] for row in trainer.state.log_history for key in ("loss", "grad_norm") if key in row])
    torch._dynamo.reset()
    assert lowered
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("arrangement", [*ARRANGEMENTS, None])
def test_a_model_whose_documents_see_each_other_is_named_once(arrangement, tmp_path, tokenizer, caplog):
    """At the start of a packed run, and never of another; the run goes on."""
    from transformers import OPTConfig, OPTForCausalLM

    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING)
    values = {"vocab_size": 96, "hidden_size": 32, "pad_token_id": 0, "num_hidden_layers": 1, "dropout": 0.0}
    values |= {"num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
    torch.manual_seed(1)
    trainer, _ = batches(
        tmp_path, tokenizer, OPTForCausalLM(OPTConfig(**values)), max_steps=2, **ARRANGEMENTS.get(arrangement, {})
    )
    trainer.train()
    lines = [r.getMessage() for r in caplog.records if "packed documents see each other" in r.getMessage()]
    assert len(lines) == (arrangement is not None)
    assert all("OPTForCausalLM" in line for line in lines)
    assert trainer.state.global_step == 2


def test_the_probe_changes_nothing_of_a_run(tmp_path, tokenizer, monkeypatch):
    """Dropout draws the same numbers with it and without."""

    def losses():
        model = tiny_llama(attention_dropout=0.2)
        trainer, _ = batches(tmp_path, tokenizer, model, packing=True, max_length=256, max_steps=3, logging_steps=1)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    asked, compare = [], PackingProbe._compare
    monkeypatch.setattr(PackingProbe, "_compare", lambda self, *given: (asked.append(1), compare(self, *given)))
    with_it = losses()
    monkeypatch.setattr(PackingProbe, "look", lambda self, inputs: None)
    assert losses() == with_it and asked == [1]
