"""What the hosts' runs leave behind: cards that keep both parts, a recorded base, adapters that verify and export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import TERMS, logits
from huggingface_hub import ModelCard
from models import tiny_llama
from transformers import AutoModelForCausalLM

from balora_plugin import RegularizerConfig
from balora_plugin.adapter.saved import card
from balora_plugin.commands import main
from balora_plugin.pretrained.fingerprint import model_fingerprint

from . import test_trainer, test_trl
from .ranks import run_worker
from .test_distributed import step


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def recorded(directory):
    """ba_lora.json, checked against the base that every test here trains on."""
    settings = json.loads((Path(directory) / "ba_lora.json").read_text())
    assert settings["base_sha256"] == model_fingerprint(tiny_llama())
    assert settings["probe"] == {"base": True, "adapted": True, "note": None}
    return settings


def check_card(directory, *words):
    """The host's words, its tags and one section of ours; returns the text."""
    text = (Path(directory) / "README.md").read_text(encoding="utf-8")
    assert text.count(card.START) == text.count(card.END) == 1
    assert text.count(model_fingerprint(tiny_llama())) == 1
    for word in words:
        assert word in text, word
    return text


def test_trl_keeps_both_cards(base, tmp_path, tokenizer, ids):
    trainer = test_trl.build(tmp_path, tokenizer, model=loaded(base), save_strategy="steps", save_steps=2)
    trainer.train()
    out = tmp_path / "out"
    check_card(out, "## Quick start", "TRL")  # written beside the first checkpoint, before any adapter is there
    check_card(out / "checkpoint-2")
    trainer.save_model()
    for _ in range(2):  # as push_to_hub does it: the host writes its card anew
        check_card(out, "## Quick start", "TRL")
        assert {"trl", "sft"} <= set(ModelCard.load(out / "README.md").data.tags)
        trainer.create_model_card(model_name="mine", tags=["extra"])
    trainer.save_model()
    assert {"extra", "trl", "lora"} <= set(ModelCard.load(out / "README.md").data.tags)
    assert recorded(out)["teacher"] == "the base itself, adapter switched off"
    assert main(["verify", str(out), "--base", str(base)]) == 0
    assert main(["export", str(out), "--output", str(tmp_path / "merged"), "--merge", "--base", str(base)]) == 0
    torch.testing.assert_close(
        logits(loaded(tmp_path / "merged"), ids), logits(trainer.model.eval(), ids), rtol=0, atol=1e-5
    )
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_the_transformers_trainer_keeps_both_cards(tmp_path, tokenizer):
    trainer = test_trainer.build(tmp_path, tokenizer, peft_config=test_trainer.adapter())
    trainer.train()
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card(model_name="mine", tags=["extra"])
        check_card(trainer.args.output_dir, "This model is a fine-tuned version", "Training hyperparameters", "- PEFT ")
        assert {"extra", "lora"} <= set(ModelCard.load(f"{trainer.args.output_dir}/README.md").data.tags)
    recorded(trainer.args.output_dir)


def test_the_teacher_is_named(tmp_path, tokenizer):
    terms = RegularizerConfig(lambda_consistency=0.5, teacher_cache=str(tmp_path / "cache"))
    cases = {
        "teacher_cache": {"peft_config": test_trl.adapter(regularizers=terms)},
        "a second model": {"teacher_model": tiny_llama()},
        "none": {"peft_config": test_trl.adapter(regularizers=RegularizerConfig(lambda_consistency=0.0))},
    }
    for word, extra in cases.items():
        values = {"peft_config": test_trl.adapter(regularizers=TERMS), **extra}
        trainer = test_trl.build(tmp_path, tokenizer, **values, max_steps=1)
        trainer.save_model(str(tmp_path / word))
        assert word in recorded(tmp_path / word)["teacher"]
        check_card(tmp_path / word, f"| teacher | {recorded(tmp_path / word)['teacher']} |")


def test_the_weights_are_hashed_once_a_run_cache_and_checkpoints_included(tmp_path, tokenizer, monkeypatch):
    from balora_plugin.pretrained import fingerprint, identity

    calls = []
    original = fingerprint.weight_digests

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    for module in (fingerprint, identity):
        monkeypatch.setattr(module, "weight_digests", counted)
    terms = RegularizerConfig(lambda_consistency=0.5, teacher_cache=str(tmp_path / "cache"))
    trainer = test_trl.build(
        tmp_path,
        tokenizer,
        peft_config=test_trl.adapter(regularizers=terms),
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    trainer.save_model()
    assert calls == [1]


def test_resuming_on_another_base_is_refused(tmp_path, tokenizer):
    trainer = test_trl.build(tmp_path, tokenizer, save_strategy="steps", save_steps=2)
    trainer.train()
    other = tiny_llama()
    other.model.layers[0].mlp.up_proj.weight.data[1, 2] += 0.1
    resumed = test_trl.build(tmp_path, tokenizer, model=other, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="belongs to another base"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_two_processes_record_the_base_and_both_probes(base, tmp_path):
    step(tmp_path / "both", "trl", 2, 2, 2)
    recorded(tmp_path / "both")
    assert main(["verify", str(tmp_path / "both"), "--base", str(base)]) == 0


_SHARDED = """
import json, sys, torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from balora_plugin import BaLoraConfig, get_ba_lora_model
from balora_plugin.adapter.saved import provenance
from tests.models import tiny_llama

dist.init_process_group("gloo")
model = get_ba_lora_model(
    tiny_llama(), BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
)
if sys.argv[2] == "before":
    provenance.prepare(model, "the base itself")
mesh = init_device_mesh("cpu", (2,))
for layer in model.get_base_model().model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
if sys.argv[2] == "after":
    provenance.prepare(model, "the base itself")
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
first = dist.get_rank() == 0
model.save_pretrained(sys.argv[1], state_dict=whole, is_main_process=first)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("prepared", ["before", "after", "never"])
def test_a_sharded_model_is_hashed_together_and_saved_without_a_forward_pass(prepared, base, tmp_path):
    """FSDP2, two processes: rank 0 alone saves, so that nothing at the save may be collective."""
    script = tmp_path / "sharded.py"
    script.write_text(_SHARDED)
    done = run_worker(str(script), str(tmp_path / "out"), prepared, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads((tmp_path / "out" / "ba_lora.json").read_text())
    assert settings["base_sha256"] == (None if prepared == "never" else model_fingerprint(tiny_llama()))
    note = "the model is sharded over processes"
    assert settings["probe"] == {"base": prepared == "before", "adapted": False, "note": note}
    assert main(["verify", str(tmp_path / "out"), "--base", str(base)]) == 0
