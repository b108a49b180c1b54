"""Adapters, checkpoints and teacher caches that earlier code has written still load, verify and train on the same."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from classifiers import batch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

from balora_plugin import BaLoraConfig, BaLoraModel, BaLoraTrainer, RegularizerConfig
from balora_plugin.commands import main

EARLIER = Path(__file__).parents[1] / "tests" / "data" / "before_layout"
ROWS = [f"The number {i} comes before {i + 1}" + " and so on" * (i % 3) for i in range(6)]
CLASSES = {"causal_lm": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
kinds = pytest.mark.parametrize("kind", CLASSES)


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A copy of the files, in the working directory: they name each other by relative paths."""
    shutil.copytree(EARLIER, tmp_path / "earlier")

    def enter(kind):
        monkeypatch.chdir(tmp_path / "earlier" / kind)
        torch.set_num_threads(1)
        return CLASSES[kind].from_pretrained("base", dtype=torch.float32)

    return enter


def adapter_tensors(directory):
    names = ("adapter_model.safetensors", "ba_lora_init.safetensors", "ba_lora_head.safetensors")
    found = {}
    for name in names:
        if Path(directory, name).exists():
            found |= {f"{name}:{key}": value for key, value in load_file(Path(directory, name)).items()}
    return found


def arguments(**changes):
    values = {
        "output_dir": "run",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "report_to": [],
        "use_cpu": True,
        "save_steps": 2,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**values, **changes})


def trainer(kind, model, cache="cache", top_k=None):
    """The run that the files come from."""
    if kind == "causal_lm":
        terms = RegularizerConfig(
            preset="iclr2026", lambda_consistency=0.5, teacher_cache=cache, teacher_cache_top_k=top_k
        )
        tokenizer = AutoTokenizer.from_pretrained("base")
        adapter = {"target_modules": "all-linear", "lora_dropout": 0.1}
        rows = Dataset.from_list([tokenizer(row) for row in ROWS])
        collator = {"data_collator": DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False)}
    else:
        terms = RegularizerConfig(preset="iclr2026", lambda_consistency=0.5, lambda_diversity=0.02, lambda_svd=0.02)
        adapter, collator = {"target_modules": ["query", "value"]}, {}
        samples = batch(8)
        rows = Dataset.from_dict({key: value.tolist() for key, value in samples.items()})
    config = BaLoraConfig(r=2, lora_alpha=2, regularizers=terms, **adapter)
    return BaLoraTrainer(model=model, args=arguments(), train_dataset=rows, peft_config=config, **collator)


@kinds
def test_an_earlier_adapter_loads_and_saves_the_same_bits(kind, earlier):
    model = BaLoraModel.from_pretrained(earlier(kind), "checkpoint-2", is_trainable=True)
    model.save_pretrained("again")
    before, after = adapter_tensors("checkpoint-2"), adapter_tensors("again")
    assert before.keys() == after.keys() and len(before) > 10
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@kinds
def test_an_earlier_adapter_is_what_plain_peft_reads(kind, earlier, ids):
    ours = BaLoraModel.from_pretrained(earlier(kind), "checkpoint-4").eval()
    plain = PeftModel.from_pretrained(earlier(kind), "checkpoint-4").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-5)


@kinds
def test_an_earlier_adapter_verifies(kind, earlier, capsys):
    earlier(kind)
    assert main(["verify", "checkpoint-4", "--base", "base"]) == 0, capsys.readouterr().out
    Path("checkpoint-4", "adapter_model.safetensors").write_bytes(
        Path("checkpoint-2", "adapter_model.safetensors").read_bytes()
    )
    assert main(["verify", "checkpoint-4", "--base", "base"]) == 1


@kinds
def test_an_earlier_run_resumes_where_it_would_have_gone(kind, earlier, caplog):
    """To rounding, as the files come from another processor; twice on this one it is the same bits."""
    found, again = {}, {}
    for tensors in (again, found):
        caplog.clear()
        shutil.rmtree("run", ignore_errors=True)
        resumed = trainer(kind, earlier(kind))
        resumed.train(resume_from_checkpoint="checkpoint-2")
        assert resumed.state.global_step == 4
        assert sum("checkpoint-2 has no ba_lora_checkpoint.json" in line for line in caplog.messages) == 1
        tensors.update(adapter_tensors("run/checkpoint-4"))
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    expected = adapter_tensors("checkpoint-4")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )
    start = adapter_tensors("checkpoint-2")
    assert any((value - start[name]).abs().max() > 1e-4 for name, value in expected.items())


@pytest.mark.parametrize(("cache", "top_k"), [("cache", None), ("cache_top", 4)])
def test_an_earlier_teacher_cache_is_read(cache, top_k, earlier):
    trained = trainer("causal_lm", earlier("causal_lm"), cache, top_k)
    trained.train()
    run = trained.ba_lora_run
    assert len(run.cache) == len(ROWS)
    assert run.cache.runs == 0  # no pass of the teacher
    assert run.cache.rows.kind == ("hidden" if top_k is None else "top_k")
    consistency = [row["balora/consistency"] for row in trained.state.log_history if "balora/consistency" in row]
    assert consistency[0] == pytest.approx(0, abs=1e-6) and consistency[-1] > 1e-5
