"""A `compute_loss` of a subclass that reads logits: a z-loss, weights of tokens, a distillation."""

from __future__ import annotations

import copy

import pytest
import torch
from classifiers import classifier
from datasets import Dataset
from helpers import TERMS
from models import VOCABULARY, tiny_llama
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainingArguments
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, BaLoraTrainer
from balora_plugin.training import run_state


def tiny_gemma2():
    """Logits with a softcap, from a tied head."""
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=VOCABULARY, num_key_value_heads=2, final_logit_softcapping=3.0, **sizes, **ends)
    )


def z_loss(logits):
    return logits.float().logsumexp(dim=-1).square().mean()


class WithZLoss:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = loss + 0.1 * z_loss(outputs.logits)
        return (loss, outputs) if return_outputs else loss


class Trainer(WithZLoss, BaLoraTrainer):
    pass


class SFT(WithZLoss, BaLoraSFTTrainer):
    pass


def build(cls, tmp_path, tokenizer, model, **changes):
    common = {"max_steps": 2, "use_cpu": True, "report_to": [], "save_strategy": "no", "seed": 1, "bf16": False}
    rows = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11))} for _ in range(8)]
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "regularizers": TERMS, **changes}
    if issubclass(cls, BaLoraSFTTrainer):
        extra = {"args": SFTConfig(str(tmp_path), **common), "processing_class": copy.deepcopy(tokenizer)}
    else:
        extra = {"args": TrainingArguments(str(tmp_path), **common)}
    return cls(model=model, train_dataset=Dataset.from_list(rows), peft_config=BaLoraConfig(**values), **extra)


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
@pytest.mark.parametrize("kind", [(Trainer, BaLoraTrainer), (SFT, BaLoraSFTTrainer)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loss_on_logits_has_its_gradient(kind, make, checkpointing, tmp_path, tokenizer, ids):
    cls, plain = kind
    trainer = build(cls, tmp_path, tokenizer, make())
    if checkpointing:
        trainer.model.enable_input_require_grads()
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    found = trainer.compute_loss(trainer.model, batch)
    alone = plain.compute_loss(trainer, trainer.model, batch)
    extra = 0.1 * z_loss(trainer.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits)
    torch.testing.assert_close(found, alone + extra)
    expected = gradients(trainer, alone + extra)
    for a, b in zip(gradients(trainer, found), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    trainer.train()
    assert trainer.state.global_step == 2


def test_logits_that_nobody_reads_are_not_made(tmp_path, tokenizer, ids, monkeypatch):
    trainer = build(BaLoraTrainer, tmp_path, tokenizer, tiny_llama())
    trainer.model.train()
    made = []
    real = run_state.project
    monkeypatch.setattr(run_state, "project", lambda *given: made.append(1) or real(*given))
    batch = {"input_ids": ids, "labels": ids}
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.loss is loss and outputs[0] is loss and outputs["loss"] is loss and not made
    expected = trainer.model(input_ids=ids).logits
    torch.testing.assert_close(outputs.logits, expected)
    again = (outputs.logits, outputs["logits"], outputs[1], outputs.get("logits"))
    assert all(value is outputs.logits for value in again) and len(made) == 1 and "logits" in outputs


def test_a_split_head_says_what_to_do(tmp_path, tokenizer, ids, monkeypatch):
    trainer = build(BaLoraTrainer, tmp_path, tokenizer, tiny_llama())
    trainer.model.train()
    _, outputs = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids}, return_outputs=True)
    monkeypatch.setattr(run_state, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"outputs\.logits.*DDP"):
        _ = outputs.logits


def test_a_classifiers_logits_have_a_gradient_too(tmp_path, tokenizer, ids):
    trainer = build(BaLoraTrainer, tmp_path, tokenizer, classifier("bert"), target_modules=None)
    trainer.model.train()
    batch = {"input_ids": ids, "labels": torch.tensor([0, 2])}
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(outputs.logits, trainer.model(input_ids=ids).logits)
    outputs.logits.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.model.parameters())
