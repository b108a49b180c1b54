"""A run begins with four lines: method, terms with their weights, teacher, what is trained."""

from __future__ import annotations

import pytest
from classifiers import classifier
from helpers import TERMS, ba_lora, stock
from models import tiny_llama
from test_acting import arguments, samples, tokens

from balora_plugin import BaLoraTrainer, RegularizerConfig
from balora_plugin.training.banner import Banner, banner

pytestmark = pytest.mark.hosts


def full(tmp_path):
    terms = RegularizerConfig(lambda_consistency=0.3, lambda_diversity=0.0, lambda_svd=0.0)
    return {"model": tiny_llama(), "regularizers": terms, "teacher_model": tiny_llama()}


def cached(tmp_path):
    terms = RegularizerConfig(lambda_consistency=0.3, teacher_cache=str(tmp_path / "cache"))
    return {"model": tiny_llama(), "regularizers": terms}


CASES = {
    "ours": (
        lambda tmp_path: {"model": ba_lora(tiny_llama(), regularizers=TERMS, init_lora_weights="pissa_fast")},
        "BA-LoRA: start pissa_fast in delta form, rank 4, alpha 4, on LlamaForCausalLM",
        "consistency 0.5 (kl), diversity 0.02, singular values 0.02 (k = 10, nuclear, logits); preset paper",
        "the base itself, adapter switched off",
    ),
    "an ordinary start": (
        lambda tmp_path: {"model": ba_lora(tiny_llama(), init_lora_weights=True)},
        "BA-LoRA: an ordinary LoRA start, rank 4, alpha 4, on LlamaForCausalLM",
        "consistency 0.0001 (kl), diversity 0.0003, singular values 0.0001 (k = 10, nuclear, logits); preset paper",
        "the base itself, adapter switched off",
    ),
    "a plain LoRA": (
        lambda tmp_path: {"model": stock(tiny_llama()), "regularizers": RegularizerConfig(preset="iclr2026")},
        "BA-LoRA: the terms on LoraConfig's adapter, rank 4, alpha 4, on LlamaForCausalLM",
        "consistency 0.025 (kl, temperature 2), diversity 0.005 (top 20), singular values 0.005 (k = 10, frobenius, "
        "logits); schedule iclr2026; preset iclr2026",
        "the base itself, adapter switched off",
    ),
    "full": (
        full,
        "BA-LoRA: the terms on full fine-tuning, on LlamaForCausalLM",
        "consistency 0.3 (kl); preset paper",
        "a second model, LlamaForCausalLM",
    ),
    "full, cached": (
        cached,
        "BA-LoRA: the terms on full fine-tuning, on LlamaForCausalLM",
        "consistency 0.3 (kl), diversity 0.0003, singular values 0.0001 (k = 10, nuclear, logits); preset paper",
        "the model as it was before the first step, its outputs kept in a teacher_cache",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_lines(name, tmp_path):
    make, method, terms, teacher = CASES[name]
    trainer = BaLoraTrainer(args=arguments(tmp_path), train_dataset=tokens(), **make(tmp_path))
    first, *rest = banner(trainer.ba_lora_run).splitlines()
    assert first == method
    assert [line[:11] for line in rest] == ["  terms    ", "  teacher  ", "  trains   "]
    assert [line[11:] for line in rest[:2]] == [terms, teacher]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert rest[2].startswith(f"  trains   {trained:,} ")


def test_a_classifier(tmp_path):
    model = ba_lora(classifier(), task_type="SEQ_CLS")
    run = BaLoraTrainer(args=arguments(tmp_path), train_dataset=samples(), model=model).ba_lora_run
    lines = banner(run).splitlines()
    assert len(lines) == 4 and "with the head that the run began with" in lines[2] and "whole" in lines[3]


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_it_is_printed_by_the_first_process_where_progress_is_shown(first, quiet, tmp_path, capsys):
    trainer = BaLoraTrainer(args=arguments(tmp_path), train_dataset=tokens(), model=ba_lora(tiny_llama()))
    trainer.args.disable_tqdm, trainer.state.is_world_process_zero = quiet, first
    capsys.readouterr()
    Banner(trainer.ba_lora_run).on_train_begin(trainer.args, trainer.state, None)
    out = capsys.readouterr().out
    assert out == (f"{banner(trainer.ba_lora_run)}\n" if first and not quiet else "")
