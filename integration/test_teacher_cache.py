"""`teacher_cache` in the trainers: the same terms without teacher passes, filled before the first step, exact again."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import fresh, logits
from models import VOCABULARY, character_tokenizer, tiny_llama, tiny_mixtral
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from balora_plugin.fused import TopLogProbs, top_log_probs
from balora_plugin.objective import causal_lm as objective
from balora_plugin.teacher import rows as teacher_rows
from balora_plugin.training.fill_cache import logger as prefill_logger

from .ranks import run_worker
from .test_trl import (  # noqa: F401
    PROMPT_COMPLETION,
    TEXT,
    adapter,
    build,
    history,
    warned,
    without_inductor,
)

ROOT = Path(__file__).parent.parent
KEYS = ("balora/task", "balora/consistency", "balora/diversity", "balora/svd", "balora/loss", "loss", "grad_norm")
ROWS = PROMPT_COMPLETION[:8]
EPOCHS = {"rows": ROWS, "max_steps": -1, "num_train_epochs": 2}
ALL = VOCABULARY  # as many log-probabilities: nothing is lost but their rounding
TOP = {"teacher_cache_top_k": 8, "temperature": 2.0}


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch):
    """The probe of packing, a few passes of the pre-trained model, has tests of its own; here passes are counted."""
    monkeypatch.setattr("balora_plugin.training.packing_probe.PackingProbe.look", lambda probe, inputs: None)


forms = pytest.mark.parametrize("kept", [{}, {"teacher_cache_top_k": ALL}], ids=["hidden", "top_k"])


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
    """A live teacher whose states are rounded as the cache's are; or kept as `top_k` log-probabilities."""

    def __init__(self, monkeypatch, top_k=0, temperature=1.0):
        original = objective._teacher_pass

        def rounded(model, request, *args):
            hidden, head = teacher = original(model, request, *args)
            if not top_k:
                return teacher._replace(hidden=hidden.to(torch.bfloat16).to(hidden.dtype))
            rows = hidden.flatten(0, 1)
            top = top_log_probs(rows, head.weight, k=top_k, temperature=temperature, bias=head.bias)
            top = top._replace(log_probs=top.log_probs.half(), log_tail=top.log_tail.float())
            return TopLogProbs(*(x.unflatten(0, hidden.shape[:2]) for x in top))

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


@pytest.mark.parametrize("case", ["padded", "packing", pytest.param("bf16_autocast", marks=pytest.mark.slow)])
def test_log_probabilities_give_the_run_of_a_live_teacher_reduced_to_them(case, tmp_path, tokenizer, monkeypatch):
    cold = trainer(tmp_path, tokenizer, tmp_path / "cache", values=TOP, **DATA[case])
    passes = Passes().watch(cold, cold.model)
    cold.train()
    assert passes.counts.keys() == {-1}
    warm = trainer(tmp_path, tokenizer, tmp_path / "cache", values=TOP, **DATA[case])
    passes = Passes().watch(warm, warm.model)
    warm.train()
    assert passes.counts == {}
    same(cold, warm)
    assert 0 <= history(cold, "balora/consistency")[0] < 1e-5  # the student is the teacher: what rounding leaves
    assert history(cold, "balora/consistency")[-1] > 1e-2
    full = trainer(tmp_path, tokenizer, values={"temperature": 2.0}, **DATA[case])
    full.train()
    assert history(cold, "balora/consistency")[-1] < 0.98 * history(full, "balora/consistency")[-1]
    Rounded(monkeypatch, top_k=8, temperature=2.0)
    exact = trainer(tmp_path, tokenizer, values={"temperature": 2.0}, **DATA[case])
    exact.train()
    for key in KEYS:
        tolerance = 2e-2 if case == "bf16_autocast" else 1e-3
        torch.testing.assert_close(history(exact, key), history(cold, key), rtol=tolerance, atol=1e-4, msg=key)


@pytest.mark.parametrize("form", ["kl", "reverse_kl", "jsd"])
def test_the_term_is_that_of_the_buckets_on_the_models_own_logits(form, tmp_path, tokenizer):
    """The definition in docs/method.md, from dense logits with a mask."""
    values = {**TOP, "consistency": form}
    trained = trainer(tmp_path, tokenizer, tmp_path / "cache", values)
    trained.train()
    batch = next(iter(trained.get_train_dataloader()))
    trained.model.eval()
    request = trained.ba_lora_requests.step(training=False)
    with torch.no_grad():
        found = trained.model(**trained.ba_lora_run.inputs(dict(batch)), ba_lora=request)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        student = trained.model(**inputs).logits
        with trained.model.disable_adapter():
            teacher = trained.model(**inputs).logits
    rows = batch["labels"][:, 1:] != -100
    z, z_t = (x[:, :-1][rows].double() / 2.0 for x in (student, teacher))
    ids = z_t.topk(8).indices
    taken = torch.zeros_like(z, dtype=torch.bool).scatter_(1, ids, True)
    p, q = (
        torch.cat([x.softmax(-1).gather(1, ids), x.softmax(-1).masked_fill(taken, 0).sum(-1, keepdim=True)], 1)
        for x in (z_t, z)
    )
    m = (p + q) / 2
    divergence = {
        "kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": 0.5 * (p * (p / m).log() + q * (q / m).log()),
    }[form]
    assert found.consistency.item() > 1e-2
    assert found.consistency.item() == pytest.approx(4.0 * divergence.sum().item(), rel=5e-3)


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


@pytest.mark.parametrize("kept", [{}, pytest.param({"teacher_cache_top_k": ALL}, marks=pytest.mark.slow)])
def test_shuffling_packing_batch_sizes_and_workers_all_hit(kept, tmp_path, tokenizer):
    """Keyed by place in the data set, they would miss or, worse, get another document's states."""
    trainer(tmp_path, tokenizer, tmp_path / "cache", kept, max_length=256).train()
    for changes in (
        {"seed": 7},
        {"per_device_train_batch_size": 3, "dataloader_drop_last": True},
        {"dataloader_num_workers": 2},
        {"packing": True, "max_length": 256},
        {"padding_free": True, "max_length": None},
        {"rows": ROWS[::-1][:5]},
    ):
        values = {"max_length": 256, **changes}
        cached = trainer(tmp_path, tokenizer, tmp_path / "cache", kept, **values)
        passes = Passes().watch(cached, cached.model)
        cached.train()
        assert passes.counts == {}, changes
        assert cached.ba_lora_run.cache.rows.kind == ("top_k" if kept else "hidden")
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
    assert len(warm.ba_lora_run.cache) == 8  # those left out of the first epoch too
    plain = trainer(tmp_path, tokenizer, per_device_train_batch_size=3, dataloader_drop_last=True)
    plain.add_callback(Look())
    consume(plain)
    plain.train()
    assert torch.equal(states[0][0], states[2][0])
    assert states[0][1:] == states[2][1:]
    assert history(warm, "balora/task")[0] == history(plain, "balora/task")[0]
    assert history(warm, "num_tokens") == history(plain, "num_tokens")


@pytest.mark.parametrize("broken", ["shard_cut", "index_gone", "header_only"])
@pytest.mark.parametrize("kept", [{}, TOP], ids=["hidden", "top_k"])
def test_a_half_written_cache_is_completed_to_the_same_run(kept, broken, tmp_path, tokenizer, monkeypatch):
    """In its own form, also by a run that leaves the choice to it."""
    monkeypatch.setattr("balora_plugin.teacher.cache.FLUSH_BYTES", 2000)
    whole = trainer(tmp_path, tokenizer, tmp_path / "cache", kept)
    whole.train()
    indices = sorted((tmp_path / "cache").glob("*.index.npy"))
    assert len(indices) > 1
    if broken == "shard_cut":
        payload = indices[0].with_name(indices[0].name.replace(".index", ""))
        payload.write_bytes(payload.read_bytes()[:-100])
    for path in {"index_gone": indices[:1], "header_only": [*(tmp_path / "cache").glob("*.npy")]}.get(broken, []):
        path.unlink()
    left = {key: value for key, value in kept.items() if key != "teacher_cache_top_k"}
    again = trainer(tmp_path, tokenizer, tmp_path / "cache", left)
    again.train()
    assert again.ba_lora_run.cache.runs > 0
    assert again.ba_lora_run.cache.rows == whole.ba_lora_run.cache.rows
    same(whole, again)


@pytest.mark.parametrize("kept", [{}, TOP], ids=["hidden", "top_k"])
def test_resuming_is_exact_and_may_name_another_directory(kept, tmp_path, tokenizer, ids):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "values": kept}
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
    original = quiet.ba_lora_run.cache.states
    quiet.ba_lora_run.cache.states = lambda *args: calls.append(quiet.state.global_step) or original(*args)
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
        runs = evaluated.ba_lora_run.cache and evaluated.ba_lora_run.cache.runs
    assert runs == 0  # the second time
    for key in ("eval_loss", "eval_balora/task", "eval_balora/consistency", "eval_balora/loss"):
        assert results[1][key] == results[2][key]
        assert results[0][key] == pytest.approx(results[1][key], rel=2e-2, abs=1e-3)


@forms
def test_a_trained_head_and_a_plain_lora(kept, tmp_path, tokenizer):
    def chosen(cache):
        return terms(cache, **(kept if cache else {}))

    for config in (
        {"peft_config": lambda cache: adapter(modules_to_save=["lm_head"], regularizers=chosen(cache))},
        {"peft_config": lambda cache: LoraConfig(r=4, target_modules=["q_proj"]), "regularizers": chosen},
    ):
        found = []
        for cache in (None, tmp_path / "cache"):
            built = {key: value(cache) for key, value in config.items()}
            found.append(trainer(tmp_path, tokenizer, **built))
            found[-1].train()
        torch.testing.assert_close(
            history(found[0], "balora/consistency"), history(found[1], "balora/consistency"), rtol=2e-2, atol=1e-3
        )
    assert found[1].ba_lora_run.cache.runs == 0  # one base, one cache


@forms
def test_what_joins_late_is_the_initial_heads(kept, tmp_path, tokenizer):
    """Evaluation data is computed when the student's head has moved already."""
    found = []
    for values in ({}, {"cache": tmp_path / "cache", **kept}):
        config = adapter(modules_to_save=["lm_head"], regularizers=terms(**values))
        trained = trainer(tmp_path, tokenizer, peft_config=config)
        trained.train()
        extra = trainer(tmp_path, tokenizer, rows=PROMPT_COMPLETION[8:]).train_dataset
        found.append(trained.evaluate(extra)["eval_balora/consistency"])
    assert found[0] == pytest.approx(found[1], rel=2e-2)


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
        runs.append(trained.ba_lora_run.cache.runs)
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


# --- hidden states or log-probabilities


@pytest.fixture
def said(monkeypatch):
    """What is logged when the cache is filled."""
    lines = []
    monkeypatch.setattr(prefill_logger, "info", lines.append)
    return lines


@pytest.fixture
def small_limit(monkeypatch):
    """17 tokens' hidden states are already too many; the data has more than a hundred."""
    monkeypatch.setattr(teacher_rows, "HIDDEN_LIMIT", 17 * 64.0)
    monkeypatch.setattr(teacher_rows, "AUTOMATIC_TOP_K", 8)


def kind(directory):
    return json.loads((directory / "cache.json").read_text())["kind"]


@pytest.mark.parametrize("changes", [{}, {"packing": True, "rows": TEXT[:12]}, {"dataloader_drop_last": True}])
def test_the_size_decides(changes, tmp_path, tokenizer, small_limit, said, warned):  # noqa: F811
    big = trainer(tmp_path, tokenizer, tmp_path / "cache", **changes)
    assert big.ba_lora_run.cache.rows is None
    assert list((tmp_path / "cache").iterdir()) == []
    big.train()
    assert kind(tmp_path / "cache") == "top_k"
    (line,) = said
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.npy"))
    for words in ("the 8 largest log-probabilities", "more than", f"{size / 1e9:.3g} GB on disk"):
        assert words in line
    assert len([message for message in warned if "9 buckets" in message]) == 1
    assert history(big, "balora/consistency")[-1] > 1e-3


def test_a_small_cache_keeps_hidden_states(tmp_path, tokenizer, said, warned):  # noqa: F811
    small = trainer(tmp_path, tokenizer, tmp_path / "cache")
    small.train()
    assert kind(tmp_path / "cache") == "hidden"
    tokens = sum(len(np.load(p)) for p in (tmp_path / "cache").glob("*.npy") if ".index" not in p.name)
    assert f"({tokens} tokens take" in said[0]
    assert not [message for message in warned if "buckets" in message]


def test_a_cache_keeps_its_form_when_the_data_grows(tmp_path, tokenizer, monkeypatch, said):
    trainer(tmp_path, tokenizer, tmp_path / "cache", rows=ROWS[:2]).train()
    monkeypatch.setattr(teacher_rows, "HIDDEN_LIMIT", 1.0)
    trainer(tmp_path, tokenizer, tmp_path / "cache").train()
    assert kind(tmp_path / "cache") == "hidden"
    assert "as the directory began" in said[1]


def test_counting_leaves_training_alone(tmp_path, tokenizer):
    """One more pass over the data than with the choice made: the same run."""
    runs = []
    for values in ({"teacher_cache_top_k": 0}, {}):
        runs.append(trainer(tmp_path, tokenizer, tmp_path / f"cache{len(runs)}", values=values))
        consume(runs[-1])
        runs[-1].train()
    same(*runs)


def test_an_evaluation_before_training_decides_by_the_training_data(tmp_path, tokenizer, small_limit):
    early = trainer(tmp_path, tokenizer, tmp_path / "cache", evaluate=True)
    early.evaluate()
    assert kind(tmp_path / "cache") == "top_k"
    assert len(early.ba_lora_run.cache) == len(early.eval_dataset)
    early.train()
    asked = trainer(tmp_path, tokenizer, tmp_path / "other", {"teacher_cache_top_k": 8}, evaluate=True)
    asked.evaluate()
    asked.train()
    same(early, asked)


def test_streamed_data_keeps_hidden_states_unasked(tmp_path, tokenizer, small_limit):
    rows = [{"input_ids": [5 + i, 6, 7 + i, 8], "labels": [-100, 6, 7 + i, 8]} for i in range(8)]
    for top_k, expected in ((None, "hidden"), (4, "top_k")):
        trained = BaLoraTrainer(
            model=tiny_llama(),
            args=TrainingArguments(str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True),
            train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
            data_collator=DataCollatorForSeq2Seq(character_tokenizer()),
            peft_config=adapter(regularizers=terms(tmp_path / expected, teacher_cache_top_k=top_k)),
        )
        trained.train()
        assert kind(tmp_path / expected) == expected


def test_another_temperature_or_form_is_refused_before_training(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer, tmp_path / "cache", values=TOP).train()
    for values, words in (
        ({}, "temperature=1 contradicts"),
        ({"preset": "iclr2026", "teacher_cache_top_k": 4}, "teacher_cache_top_k=4 contradicts"),
        ({"consistency": "mse"}, "consistency='mse' needs all logits"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer(tmp_path, tokenizer, tmp_path / "cache", values=values)
    trainer(tmp_path, tokenizer, tmp_path / "cache", values={"preset": "iclr2026"})  # at temperature 2 too


@pytest.mark.slow
def test_compiled_steps_with_log_probabilities(tmp_path, tokenizer, without_inductor):  # noqa: F811
    settings = {"max_steps": 3, "learning_rate": 1e-2}
    runs = []
    for compile in (False, True):
        config = adapter(regularizers=terms(tmp_path / "cache", **TOP, share_interval=0), compile=compile)
        torch._dynamo.utils.counters.clear()
        runs.append(trainer(tmp_path, tokenizer, model=tiny_llama(num_hidden_layers=1), peft_config=config, **settings))
        runs[-1].train()
    assert "compile" not in runs[1].ba_lora_run.warn.said
    assert not torch._dynamo.utils.counters["graph_break"]
    assert without_inductor
    for key in KEYS:
        torch.testing.assert_close(history(runs[1], key), history(runs[0], key), rtol=1e-5, atol=1e-5, msg=key)


# --- full fine-tuning


def full(tmp_path, tokenizer, cache=None, **changes):
    settings = {"model": tiny_llama(), "regularizers": terms(cache), "learning_rate": 1e-3, **changes}
    return trainer(tmp_path, tokenizer, **settings)


@forms
def test_full_fine_tuning_needs_no_second_model(kept, tmp_path, tokenizer):
    settings = {"evaluate": True, "eval_strategy": "epoch", "regularizers": terms(tmp_path / "cache", **kept)}
    cached = full(tmp_path, tokenizer, **settings)
    cached.train()
    two = full(tmp_path, tokenizer, teacher_model=tiny_llama(), **{**settings, "regularizers": terms()})
    two.train()
    for key in (*KEYS, "eval_balora/consistency", "eval_balora/loss"):
        torch.testing.assert_close(history(cached, key), history(two, key), rtol=2e-2, atol=1e-3, msg=key)
    assert history(cached, "balora/consistency")[-1] > 1e-2  # the head moved too
    own = full(tmp_path, tokenizer, tmp_path / "cache", teacher_model=tiny_llama())  # one teacher, one cache
    own.train()
    assert own.ba_lora_run.cache.runs == 0
    again = full(tmp_path, tokenizer, **settings)
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
@pytest.mark.parametrize(
    "kept", [pytest.param("", id="by_size"), pytest.param(f":{ALL}", id="top_k", marks=pytest.mark.long)]
)
def test_two_processes_fill_one_cache(kept, tmp_path):
    logs = {}
    for name, ranks, cache in (("live", 1, ""), ("cold", 2, "cache"), ("warm", 2, "cache")):
        directory = tmp_path / name
        directory.mkdir()
        arguments = [str(directory / "result.pt"), str(8 // ranks), "1", str(directory), "trl"]
        arguments.append(f"{tmp_path / cache}{kept}" if cache else "")
        done = run_worker("ddp.py", *arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        result = torch.load(directory / "result.pt", weights_only=False)
        logs[name] = [{**row} for row in result["logs"]], result["eval"], result["runs"]
    assert logs["warm"][2] == 0 < logs["cold"][2]
    assert [row.get("loss") for row in logs["warm"][0]] == [row.get("loss") for row in logs["cold"][0]]
    for ours, theirs in zip(logs["cold"][0], logs["live"][0], strict=True):
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-2, abs=2e-3), key
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["kind"] == ("top_k" if kept else "hidden")


def test_the_checkpoint_says_which_directory(tmp_path, tokenizer):
    saved = trainer(tmp_path, tokenizer, tmp_path / "cache", max_steps=1)
    saved.train()
    saved.save_model(str(tmp_path / "adapter"))
    settings = json.loads((tmp_path / "adapter" / "ba_lora.json").read_text())
    assert settings["regularizers"]["teacher_cache"] == str(tmp_path / "cache")
    assert fresh(terms(tmp_path / "cache")) == terms(str(tmp_path / "cache"))
    assert BaLoraConfig.from_pretrained(tmp_path / "adapter").regularizers.teacher_cache == str(tmp_path / "cache")
    (tmp_path / "cache").rename(tmp_path / "elsewhere")  # as on somebody else's machine
    assert BaLoraConfig.from_pretrained(tmp_path / "adapter").regularizers.teacher_cache is None
    assert not (tmp_path / "cache").exists()


def test_less_than_an_epoch_is_not_passed_over_before(tmp_path, tokenizer):
    short = trainer(tmp_path, tokenizer, tmp_path / "cache", max_steps=2)
    assert 2 * short.args.train_batch_size < len(short.train_dataset)
    short.train()
    assert short.ba_lora_run.cache.runs <= 2 + 1  # a pass each, and the comparison with a document on its own
    assert len(short.ba_lora_run.cache) <= 2 * short.args.train_batch_size
