"""`teacher_cache` in the trainers: the same terms without teacher passes, filled before the first step, exact again."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import fresh, logits
from models import character_tokenizer, tiny_llama, tiny_mixtral
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments

from balora_plugin import BaLoraTrainer, RegularizerConfig, objective
from integration.test_distributed import free_port
from integration.test_trl import PROMPT_COMPLETION, TEXT, adapter, build, history, warned  # noqa: F401

ROOT = Path(__file__).parent.parent
KEYS = ("balora/task", "balora/consistency", "balora/diversity", "balora/svd", "balora/loss", "loss", "grad_norm")
ROWS = PROMPT_COMPLETION[:8]
EPOCHS = {"rows": ROWS, "max_steps": -1, "num_train_epochs": 2}


def terms(cache=None, **changes):
    values = {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02, "svd_top_k": 3}
    return RegularizerConfig(**{**values, **changes}, teacher_cache=cache)


def trainer(tmp_path, tokenizer, cache=None, values=None, **changes):
    if "peft_config" not in changes and "regularizers" not in changes:
        changes["peft_config"] = adapter(lora_dropout=0.1, regularizers=terms(cache, **(values or {})))
    return build(tmp_path, tokenizer, **{**EPOCHS, **changes})


def same(a, b, keys=KEYS):
    for key in keys:
        assert history(a, key) == history(b, key), key
        assert history(a, key), key


class Rounded:
    """A live teacher whose states are rounded as the cache's are."""

    def __init__(self, monkeypatch):
        original = objective._teacher_pass

        def rounded(*args):
            hidden, head = original(*args)
            return hidden.to(torch.bfloat16).to(hidden.dtype), head

        monkeypatch.setattr(objective, "_teacher_pass", rounded)


class Passes(TrainerCallback):
    """Counts forwards of the backbone with the adapter off, by epoch; -1: before the first."""

    def __init__(self):
        self.epoch, self.counts = -1, {}

    def watch(self, trained, model):
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        layer.register_forward_pre_hook(lambda module, args: self.count() if module._disable_adapters else None)
        trained.add_callback(self)
        return self

    def count(self):
        self.counts[self.epoch] = self.counts.get(self.epoch, 0) + 1

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch += 1


DATA = {
    "padded": {},
    "packing": {"rows": TEXT[:12], "packing": True, "max_length": 64, "per_device_train_batch_size": 1},
    "padding_free": {"padding_free": True, "max_length": None},
    "bf16_autocast": {"bf16": True},
    "accumulation_checkpointing": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", DATA)
def test_cold_warm_and_live_give_the_same_run(case, tmp_path, tokenizer, monkeypatch):
    cold = trainer(tmp_path, tokenizer, tmp_path / "cache", **DATA[case])
    passes = Passes().watch(cold, cold.model)
    cold.train()
    assert passes.counts.keys() == {-1}  # all before the first step
    warm = trainer(tmp_path, tokenizer, tmp_path / "cache", **DATA[case])
    passes = Passes().watch(warm, warm.model)
    warm.train()
    assert passes.counts == {}
    same(cold, warm)
    live = trainer(tmp_path, tokenizer, **DATA[case])
    live.train()
    for key in KEYS:
        torch.testing.assert_close(history(live, key), history(cold, key), rtol=2e-2, atol=1e-3, msg=key)
    Rounded(monkeypatch)
    exact = trainer(tmp_path, tokenizer, **DATA[case])
    exact.train()
    if case == "packing":  # each row a batch of its own: nothing is composed anew in the second epoch
        same(exact, cold)
    for key in KEYS:  # otherwise the last bits of a live teacher follow the batch
        tolerance = 2e-2 if case == "bf16_autocast" else 1e-3
        torch.testing.assert_close(history(exact, key), history(cold, key), rtol=tolerance, atol=1e-4, msg=key)


def test_shuffling_packing_batch_sizes_and_workers_all_hit(tmp_path, tokenizer):
    """Keyed by place in the data set, they would miss or, worse, get another document's states."""
    trainer(tmp_path, tokenizer, tmp_path / "cache", max_length=256).train()
    for changes in (
        {"seed": 7},
        {"per_device_train_batch_size": 3, "dataloader_drop_last": True},
        {"dataloader_num_workers": 2},
        {"packing": True, "max_length": 256},
        {"padding_free": True, "max_length": None},
        {"rows": ROWS[::-1][:5]},
    ):
        values = {"max_length": 256, **changes}
        cached = trainer(tmp_path, tokenizer, tmp_path / "cache", **values)
        passes = Passes().watch(cached, cached.model)
        cached.train()
        assert passes.counts == {}, changes
        live = trainer(tmp_path, tokenizer, **values)
        live.train()
        torch.testing.assert_close(
            history(cached, "balora/consistency"), history(live, "balora/consistency"), rtol=2e-2, atol=1e-3
        )


def consume(trained):
    """A collator that draws random numbers, as one that augments would."""
    collate = trained.data_collator
    trained.data_collator = lambda examples: (random.random(), np.random.rand(), torch.rand(1)) and collate(examples)


def test_the_pass_before_training_leaves_training_alone(tmp_path, tokenizer):
    """Random states, the sampler's order and what a dropping loader leaves out."""
    warm = trainer(tmp_path, tokenizer, tmp_path / "cache", per_device_train_batch_size=3, dataloader_drop_last=True)
    states = []

    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            states.append((torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()))

    warm.add_callback(Look())
    consume(warm)
    warm.train()
    assert len(warm._ba_lora_cache) == 8  # those left out of the first epoch too
    plain = trainer(tmp_path, tokenizer, per_device_train_batch_size=3, dataloader_drop_last=True)
    plain.add_callback(Look())
    consume(plain)
    plain.train()
    assert torch.equal(states[0][0], states[2][0])
    assert states[0][1:] == states[2][1:]
    assert history(warm, "balora/task")[0] == history(plain, "balora/task")[0]
    assert history(warm, "num_tokens") == history(plain, "num_tokens")


@pytest.mark.parametrize("broken", ["shard_cut", "index_gone", "header_only"])
def test_a_half_written_cache_is_completed_to_the_same_run(broken, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("balora_plugin.teacher_cache.FLUSH_BYTES", 2000)
    whole = trainer(tmp_path, tokenizer, tmp_path / "cache")
    whole.train()
    indices = sorted((tmp_path / "cache").glob("*.index.npy"))
    assert len(indices) > 1
    if broken == "shard_cut":
        payload = indices[0].with_name(indices[0].name.replace(".index", ""))
        payload.write_bytes(payload.read_bytes()[:-100])
    for path in {"index_gone": indices[:1], "header_only": [*(tmp_path / "cache").glob("*.npy")]}.get(broken, []):
        path.unlink()
    again = trainer(tmp_path, tokenizer, tmp_path / "cache")
    again.train()
    assert again._ba_lora_cache.runs > 0
    same(whole, again)


def test_resuming_is_exact_and_may_name_another_directory(tmp_path, tokenizer, ids):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path, tokenizer, tmp_path / "cache", **settings)
    whole.train()
    expected = logits(whole.model.eval(), ids)
    shutil.copytree(tmp_path / "cache", tmp_path / "moved")
    for directory in (tmp_path / "cache", tmp_path / "moved", tmp_path / "new"):
        resumed = trainer(tmp_path, tokenizer, directory, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        assert torch.equal(logits(resumed.model.eval(), ids), expected)
        assert history(resumed)[-3:] == history(whole)[3:]


def test_another_base_or_tokenizer_is_refused_before_training(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer, tmp_path / "cache").train()
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3
    with pytest.raises(ValueError, match=r"teacher_cache=.*another base model.*[0-9a-f]{8}, here [0-9a-f]{8}"):
        trainer(tmp_path, tokenizer, tmp_path / "cache", model=other)
    with pytest.raises(ValueError, match=r"another precision of the teacher: float32, here float32, bf16 autocast"):
        trainer(tmp_path, tokenizer, tmp_path / "cache", bf16=True)
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["yes"])
    with pytest.raises(ValueError, match="another tokenizer"):
        trainer(tmp_path, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize("off", [{"lambda_consistency": 0.0}, {"lambda_consistency": 0.5, "teacher_interval": 99}])
def test_where_the_teacher_is_off_the_cache_is_not_touched(off, tmp_path, tokenizer):
    quiet = trainer(tmp_path, tokenizer, tmp_path / "cache", values=off)
    if not off["lambda_consistency"]:
        quiet.train()
        assert not (tmp_path / "cache").exists()
        return
    calls = []
    original = quiet._ba_lora_cache.states
    quiet._ba_lora_cache.states = lambda *args: calls.append(quiet.state.global_step) or original(*args)
    quiet.train()
    assert calls == [0] * 5  # four batches before training, one micro-batch in it


def test_evaluation_data_joins_the_cache(tmp_path, tokenizer):
    held_out = Dataset.from_list(PROMPT_COMPLETION[8:])
    results = []
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        evaluated = trainer(tmp_path, tokenizer, cache)
        evaluated.train()
        extra = trainer(tmp_path, tokenizer, None, rows=list(held_out)).train_dataset
        results.append(evaluated.evaluate(extra))
        runs = evaluated._ba_lora_cache and evaluated._ba_lora_cache.runs
    assert runs == 0  # the second time
    for key in ("eval_loss", "eval_balora/task", "eval_balora/consistency", "eval_balora/loss"):
        assert results[1][key] == results[2][key]
        assert results[0][key] == pytest.approx(results[1][key], rel=2e-2, abs=1e-3)


def test_a_trained_head_and_a_plain_lora(tmp_path, tokenizer):
    for config in (
        {"peft_config": lambda cache: adapter(modules_to_save=["lm_head"], regularizers=terms(cache))},
        {"peft_config": lambda cache: LoraConfig(r=4, target_modules=["q_proj"]), "regularizers": terms},
    ):
        found = []
        for cache in (None, tmp_path / "cache"):
            built = {key: value(cache) for key, value in config.items()}
            found.append(trainer(tmp_path, tokenizer, **built))
            found[-1].train()
        torch.testing.assert_close(
            history(found[0], "balora/consistency"), history(found[1], "balora/consistency"), rtol=2e-2, atol=1e-3
        )
    assert found[1]._ba_lora_cache.runs == 0  # one base, one cache


def test_experts(tmp_path, tokenizer):
    config = adapter(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], regularizers=terms())
    found = []
    for cache in (None, tmp_path / "cache"):
        config.regularizers.teacher_cache = cache and str(cache)
        found.append(
            trainer(
                tmp_path, tokenizer, model=tiny_mixtral(), peft_config=config, router_aux_loss_coef=0.1, max_steps=4
            )
        )
        found[-1].train()
    for key in ("aux_loss", "balora/consistency"):
        torch.testing.assert_close(history(found[0], key), history(found[1], key), rtol=2e-2, atol=1e-3)


def test_an_iterable_data_set_fills_it_as_it_goes(tmp_path, tokenizer):
    rows = [{"input_ids": [5 + i, 6, 7 + i, 8], "labels": [-100, 6, 7 + i, 8]} for i in range(8)]
    runs = []
    for _ in range(2):
        trained = BaLoraTrainer(
            model=tiny_llama(),
            args=TrainingArguments(str(tmp_path / "out"), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True),
            train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
            data_collator=DataCollatorForSeq2Seq(character_tokenizer()),
            peft_config=adapter(regularizers=terms(tmp_path / "cache"), task_type="CAUSAL_LM"),
        )
        trained.train()
        runs.append(trained._ba_lora_cache.runs)
    assert runs[0] > 0
    assert runs[1] == 0


def test_data_that_changes_is_said_once(tmp_path, tokenizer, warned):  # noqa: F811
    changing = trainer(tmp_path, tokenizer, tmp_path / "cache", max_steps=4)
    collate = changing.data_collator
    count = iter(range(10**6))

    def other_each_time(examples):
        batch = collate(examples)
        batch["input_ids"][:, 0] = 5 + next(count) % 80
        return batch

    changing.data_collator = other_each_time
    changing.train()
    assert len([message for message in warned if "lacked a document at step" in message]) == 1


# --- full fine-tuning


def full(tmp_path, tokenizer, cache=None, **changes):
    settings = {"model": tiny_llama(), "regularizers": terms(cache), "learning_rate": 1e-3, **changes}
    return trainer(tmp_path, tokenizer, **settings)


def test_full_fine_tuning_needs_no_second_model(tmp_path, tokenizer):
    settings = {"evaluate": True, "eval_strategy": "epoch"}
    cached = full(tmp_path, tokenizer, tmp_path / "cache", **settings)
    cached.train()
    two = full(tmp_path, tokenizer, teacher_model=tiny_llama(), **settings)
    two.train()
    for key in (*KEYS, "eval_balora/consistency", "eval_balora/loss"):
        torch.testing.assert_close(history(cached, key), history(two, key), rtol=2e-2, atol=1e-3, msg=key)
    assert history(cached, "balora/consistency")[-1] > 1e-2  # the head moved too
    own = full(tmp_path, tokenizer, tmp_path / "cache", teacher_model=tiny_llama())  # one teacher, one cache
    own.train()
    assert own._ba_lora_cache.runs == 0
    again = full(tmp_path, tokenizer, tmp_path / "cache", **settings)
    again.train()
    same(again, cached)


def test_full_fine_tuning_resumes_with_a_whole_cache_only(tmp_path, tokenizer, ids):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = full(tmp_path, tokenizer, tmp_path / "cache", **settings)
    whole.train()
    expected = logits(whole.model.eval(), ids)
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    resumed = full(tmp_path, tokenizer, tmp_path / "cache", **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(logits(resumed.model.eval(), ids), expected)
    with pytest.raises(RuntimeError, match="full fine-tuning resumes with weights that are no longer the teacher's"):
        full(tmp_path, tokenizer, tmp_path / "new", **settings).train(resume_from_checkpoint=checkpoint)
    moved = type(tiny_llama()).from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="another base model"):
        full(tmp_path, tokenizer, tmp_path / "cache", model=moved, **settings)


def test_full_fine_tuning_names_what_it_cannot_have(tmp_path, tokenizer):
    trained = full(tmp_path, tokenizer, tmp_path / "cache")
    trained.train()
    batch = next(iter(trainer(tmp_path, tokenizer, rows=PROMPT_COMPLETION[8:]).get_train_dataloader()))
    trained.model.train()
    with pytest.raises(RuntimeError, match=r"lacks the document at tokens .* at step 8.*pass teacher_model"):
        trained.compute_loss(trained.model, dict(batch))
    with pytest.raises(ValueError, match="bf16_full_eval=True"):
        full(tmp_path, tokenizer, tmp_path / "cache", bf16_full_eval=True)
    with pytest.raises(ValueError, match="set teacher_cache"):
        full(tmp_path, tokenizer)


# --- several processes


@pytest.mark.slow
def test_two_processes_fill_one_cache(tmp_path):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    worker = ["integration/ddp_worker.py"]
    logs = {}
    for name, ranks, cache in (("live", 1, ""), ("cold", 2, "cache"), ("warm", 2, "cache")):
        directory = tmp_path / name
        directory.mkdir()
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
        arguments = [str(directory / "result.pt"), str(8 // ranks), "1", str(directory), "trl"]
        arguments += [str(tmp_path / cache)] if cache else []
        done = subprocess.run(
            [*launcher, *worker, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result = torch.load(directory / "result.pt", weights_only=False)
        logs[name] = [{**row} for row in result["logs"]], result["eval"], result["runs"]
    assert logs["warm"][2] == 0 < logs["cold"][2]
    assert [row.get("loss") for row in logs["warm"][0]] == [row.get("loss") for row in logs["cold"][0]]
    for ours, theirs in zip(logs["cold"][0], logs["live"][0], strict=True):
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-2, abs=2e-3), key
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["kind"] == "hidden"


def test_the_checkpoint_says_which_directory(tmp_path, tokenizer):
    saved = trainer(tmp_path, tokenizer, tmp_path / "cache", max_steps=1)
    saved.train()
    saved.save_model(str(tmp_path / "adapter"))
    settings = json.loads((tmp_path / "adapter" / "ba_lora.json").read_text())
    assert settings["regularizers"]["teacher_cache"] == str(tmp_path / "cache")
    assert fresh(terms(tmp_path / "cache")) == terms(str(tmp_path / "cache"))
