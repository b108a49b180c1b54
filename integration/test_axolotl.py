"""`adapter: ba_lora` in Axolotl: its own loading, training and merging code, in one process (imports are slow)."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("axolotl")

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.cli.preprocess import do_cli as preprocess
from axolotl.cli.utils import load_model_and_tokenizer
from axolotl.common.datasets import load_datasets
from axolotl.core.trainers.base import AxolotlTrainer
from datasets import Dataset
from helpers import assert_base_untouched, base_parameters, logits
from models import character_tokenizer, tiny_llama
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, RegularizerConfig, get_ba_lora_model
from balora_plugin.config import RECOMMENDED
from balora_plugin.hosts.axolotl import checks
from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin, adapter_config
from balora_plugin.hosts.axolotl.trainer import AxolotlBaLoraTrainer
from studies.quickstart import measure, settings, tiny_model, with_axolotl
from studies.quickstart.corpus import Corpus, Instruction
from studies.quickstart.methods import METHODS
from studies.quickstart.run import check_reload

from .axolotl_run import history, run

ROOT = Path(__file__).parent.parent
TERMS = {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02}


def base_model(workspace):
    return AutoModelForCausalLM.from_pretrained(workspace / "base", dtype=torch.float32).eval()


WORKS = {
    "plain": {},
    "no_block": {"ba_lora": None},
    "packing": {"sample_packing": True, "pad_to_sequence_len": True, "attn_implementation": "sdpa"},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing_reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "accumulation": {"gradient_accumulation_steps": 3},
    "modules_to_save": {"lora_modules_to_save": ["norm"]},
    "patterns": {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"v_proj": 8}},
    "target_modules": {"lora_target_linear": None, "lora_target_modules": ["q_proj", "up_proj"]},
    "rslora_dropout": {"peft_use_rslora": True, "lora_dropout": 0.1},
    "fast": {"peft_init_lora_weights": "pissa_fast"},
    "plain_start": {"peft_init_lora_weights": True},
    "tokens_per_second": {"include_tkps": True},
}


@pytest.mark.parametrize("case", WORKS)
def test_trains_from_a_zero_consistency_and_saves_a_stock_adapter(case, workspace, written, ids):
    trainer = run(written(**WORKS[case]))
    assert isinstance(trainer, AxolotlBaLoraTrainer)
    consistency = history(trainer, "balora/consistency")
    assert abs(consistency[0]) < 1e-9
    assert consistency[-1] > 1e-6
    torch.testing.assert_close(
        torch.tensor(history(trainer, "balora/task")).exp(), torch.tensor(history(trainer, "ppl"))
    )
    for key in ("loss", "balora/task", "balora/diversity", "balora/svd", "balora/loss"):
        assert len(history(trainer, key)) == 3, key
        assert all(math.isfinite(value) for value in history(trainer, key))
    expected = logits(trainer.model.eval(), ids)
    stock = PeftModel.from_pretrained(base_model(workspace), trainer.args.output_dir).eval()
    torch.testing.assert_close(logits(stock, ids), expected, rtol=0, atol=1e-5)
    assert (expected - logits(base_model(workspace), ids)).abs().max() > 1e-3


@pytest.mark.parametrize("how", [True, pytest.param("layers", marks=pytest.mark.long)])
def test_compiled(how, written, monkeypatch):
    """One key of the block, said twice here; without inductor below, whose C++ takes most of a minute.

    Axolotl's checkpointing is reentrant by default, which no graph of a model can hold.
    """
    from torch._dynamo.backends.debugging import aot_eager

    from balora_plugin.compile import backend

    graphs = []

    def lower(module, inputs, options):
        graphs.append(module)
        return aot_eager(module, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(backend, "lower", lower)
    plain = run(written(ba_lora=TERMS, gradient_checkpointing=True))
    host = {"torch_compile": True, "torch_compile_backend": "ba_lora", "gradient_checkpointing": True}
    compiled = run(written(ba_lora={**TERMS, "compile": how}, **host))
    torch._dynamo.reset()
    assert graphs
    assert "compile" not in compiled.ba_lora_run.warn.said  # it did not fall back
    assert plain.args.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert compiled.args.gradient_checkpointing_kwargs == {"use_reentrant": how == "layers"}
    for key in ("loss", "balora/consistency", "balora/svd"):
        torch.testing.assert_close(history(compiled, key), history(plain, key), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", [True, "layers"])
def test_a_compilation_that_fails_is_said(how, written, monkeypatch):
    """Axolotl lets dynamo keep errors to itself."""
    from balora_plugin.compile import backend

    def lower(module, inputs, options):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(backend, "lower", lower)
    before = torch._dynamo.config.suppress_errors
    host = {"torch_compile": True, "torch_compile_backend": "ba_lora", "max_steps": 1}
    trainer = run(written(ba_lora={**TERMS, "compile": how}, **host))
    torch._dynamo.reset()
    assert torch._dynamo.config.suppress_errors
    torch._dynamo.config.suppress_errors = before
    assert "compile" in trainer.ba_lora_run.warn.said
    assert all(math.isfinite(value) for value in history(trainer, "loss"))


def test_the_base_is_untouched_and_the_yaml_is_what_runs(workspace, written):
    terms = {"preset": "iclr2026", "lambda_svd": 0.4, "svd_top_k": 3, "teacher_interval": 2, "schedule": "constant"}
    trainer = run(written(ba_lora=terms, lora_r=3, lora_alpha=6, lora_dropout=0.2))
    expected = RegularizerConfig.from_dict(terms).resolved("nlg")
    assert trainer.ba_lora == expected
    config = trainer.model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, str(config.init_lora_weights)) == (3, 6, 0.2, "pissa")
    targets = {name.rpartition(".")[2] for name in config.target_modules}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    settings = json.loads((Path(trainer.args.output_dir) / "ba_lora.json").read_text())
    assert settings["regularizers"]["lambda_svd"] == 0.4
    assert_base_untouched(trainer.model, base_parameters(base_model(workspace)))


def test_evaluation_during_training(written):
    trainer = run(written(val_set_size=0.25, eval_steps=1, eval_strategy="steps"))
    assert len(history(trainer, "eval_balora/task")) == len(history(trainer, "eval_loss")) >= 3
    for key in ("consistency", "diversity", "svd", "loss"):
        assert history(trainer, f"eval_balora/{key}")


def tokenised(written):
    cfg = load_cfg(str(written(name="tokenised.yml")))
    return load_datasets(cfg=cfg, cli_args=TrainerCliArgs()).train_dataset


@pytest.mark.parametrize(
    ("micro", "steps", "terms"),
    [(12, 1, TERMS), (3, 2, TERMS), (2, 3, {"preset": "iclr2026", "svd_top_k": 5})],
)
def test_the_terms_are_trls(micro, steps, terms, workspace, written, tmp_path):
    """Same data in the same order: normalised over the accumulated batch, not by Axolotl's micro-batch mean."""
    ours = run(
        written(
            ba_lora=terms,
            micro_batch_size=micro,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            num_epochs=9,
            curriculum_sampling=True,  # in the order of the file
        )
    )
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in tokenised(written)]
    assert len(rows) == 12
    theirs = BaLoraSFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=3,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=character_tokenizer(),
        peft_config=BaLoraConfig(
            r=4, lora_alpha=4, target_modules="all-linear", regularizers=RegularizerConfig.from_dict(terms)
        ),
    )
    theirs.train()
    for key in (
        "loss",
        "grad_norm",
        "balora/task",
        "balora/consistency",
        "balora/diversity",
        "balora/svd",
        "balora/loss",
    ):
        assert len(history(ours, key)) == len(history(theirs, key)), key
        torch.testing.assert_close(history(ours, key), history(theirs, key), rtol=1e-4, atol=1e-6, msg=key)


def test_resuming_ends_with_the_same_adapter(written, ids):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    whole = run(written(**settings))
    expected = logits(whole.model.eval(), ids)
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    resumed = run(written(**settings, resume_from_checkpoint=checkpoint))
    assert torch.equal(logits(resumed.model.eval(), ids), expected)
    assert history(resumed, "balora/loss")[-2:] == history(whole, "balora/loss")[-2:]


def test_continuing_from_a_saved_adapter_keeps_the_original_base_as_teacher(workspace, written, tmp_path, ids):
    first = run(written())
    expected = logits(first.model.eval(), ids)
    path = written(name="second.yml", lora_model_dir=first.args.output_dir, output_dir=str(tmp_path / "second"))
    cfg = load_cfg(str(path))
    model, _, _ = load_model_and_tokenizer(cfg=cfg)
    torch.testing.assert_close(logits(model.eval(), ids), expected, rtol=0, atol=1e-6)
    second = run(path)
    assert history(second, "balora/consistency")[0] > 1e-4  # from the first token on it is not the base any more
    stock = PeftModel.from_pretrained(base_model(workspace), tmp_path / "second").eval()
    torch.testing.assert_close(logits(stock, ids), logits(second.model.eval(), ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["memory_efficient", "legacy"])
def test_merge_lora(method, written, tmp_path, ids):
    trainer = run(written(peft_use_rslora=True))
    expected = logits(trainer.model.eval(), ids)
    merge_lora(str(written()), lora_model_dir=trainer.args.output_dir, merge_method=method)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=0, atol=1e-4)


def test_preprocess_and_inference_loading(written, tmp_path, ids):
    prepared = tmp_path / "prepared"
    preprocess(str(written(dataset_prepared_path=str(prepared))))
    found = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.arrow")}
    assert found
    trainer = run(written(dataset_prepared_path=str(prepared)))
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*.arrow")} == found  # nothing tokenised again
    cfg = load_cfg(str(written(lora_model_dir=trainer.args.output_dir)), inference=True)
    model, _, _ = load_model_and_tokenizer(cfg=cfg, inference=True)
    torch.testing.assert_close(logits(model.eval(), ids), logits(trainer.model.eval(), ids), rtol=0, atol=1e-6)


# Axolotl turns its CUDA kernels on for adapter: lora by itself
NO_KERNELS = {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}


@pytest.mark.parametrize("adapter", ["lora", None])
def test_the_papers_baselines_are_axolotls_own_trainer(adapter, written):
    """One key away: the plug-in stays in the YAML and does nothing."""
    trainer = run(
        written(adapter=adapter, ba_lora=None, peft_init_lora_weights="pissa" if adapter else None, **NO_KERNELS)
    )
    assert type(trainer) is AxolotlTrainer
    assert not history(trainer, "balora/task")


def test_the_terms_on_a_plain_lora(written):
    trainer = run(written(adapter="lora", ba_lora={**TERMS, "apply_to": "lora"}))
    assert isinstance(trainer, AxolotlBaLoraTrainer)
    assert not isinstance(trainer.model.peft_config["default"], BaLoraConfig)
    assert history(trainer, "balora/consistency")[0] == 0
    assert history(trainer, "balora/consistency")[-1] > 0


def test_the_terms_on_full_fine_tuning(written):
    terms = {"lambda_consistency": 0.0, "lambda_diversity": 0.1, "lambda_svd": 0.1, "apply_to": "full"}
    trainer = run(written(adapter=None, ba_lora=terms, lora_target_linear=None))
    assert isinstance(trainer, AxolotlBaLoraTrainer)
    assert history(trainer, "balora/svd")


def test_full_fine_tuning_has_its_teacher_in_a_cache(workspace, written, tmp_path):
    """Filled before the first step, for evaluation data too: the pre-trained model, while the weights move away."""
    terms = {**TERMS, "apply_to": "full", "teacher_cache": str(tmp_path / "cache")}
    changes = {"val_set_size": 0.25, "eval_strategy": "steps", "eval_steps": 1, "seed": 2}
    trainer = run(written(adapter=None, ba_lora=terms, lora_target_linear=None, **changes))
    assert isinstance(trainer, AxolotlBaLoraTrainer)
    consistency = history(trainer, "balora/consistency")
    assert consistency[0] < 1e-4 < consistency[-1]  # bfloat16 states: not quite 0
    model, base = trainer.model.eval(), base_model(workspace)
    total = count = 0.0
    for row in trainer.eval_dataset:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        counted = labels[:, 1:] != -100
        student, teacher = (logits(m, ids)[:, :-1][counted].log_softmax(-1) for m in (model, base))
        total += float((teacher.exp() * (teacher - student)).sum())
        count += int(counted.sum())
    assert history(trainer, "eval_balora/consistency")[-1] == pytest.approx(total / count, rel=3e-2)


WRONG = {
    "no_rank": ({"lora_r": None}, "lora_r"),
    "no_alpha": ({"lora_alpha": None}, "lora_alpha"),
    "no_targets": ({"lora_target_linear": None}, "lora_target_modules"),
    "head": ({"lora_target_linear": None, "lora_target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "embedding": ({"lora_target_linear": None, "lora_target_modules": ["embed_tokens"]}, "embed_tokens"),
    "start": ({"peft_init_lora_weights": "olora"}, "peft_init_lora_weights: olora"),
    "start_niter": ({"peft_init_lora_weights": "pissa_niter_16"}, "peft_init_lora_weights: pissa_niter_16"),
    "lora_beside_block": ({"adapter": "lora"}, "adapter: lora beside a ba_lora: block"),
    "qlora_beside_block": ({"adapter": "qlora", "load_in_4bit": True}, "adapter: qlora beside a ba_lora: block"),
    "full_beside_block": ({"adapter": None}, "ba_lora.apply_to: full"),
    "apply_to_mismatch": ({"adapter": "lora", "ba_lora": {"apply_to": "full"}}, "adapter: lora"),
    "apply_to_self": ({"ba_lora": {"apply_to": "lora"}}, "ba_lora.apply_to: lora"),
    "misspelt_block": ({"ba_lora": None, "ba_loraa": TERMS}, "ba_loraa"),
    "misspelt_block_dash": ({"ba_lora": None, "balora": TERMS}, "balora"),
    "field_at_top": ({"lambda_svd": 0.1}, "lambda_svd: 0.1"),
    "misspelt_field_at_top": ({"lambda_consistancy": 0.1}, "lambda_consistancy: 0.1"),
    "misspelt_field": ({"ba_lora": {"lambda_svdd": 0.1}}, "did you mean lambda_svd?"),
    "unknown_field": ({"ba_lora": {"zzz": 0.1}}, "ba_lora.zzz"),
    "papers_number": ({"ba_lora": {"lambda1": 0.1}}, "did you mean lambda_consistency?"),
    "papers_letters": ({"ba_lora": {"lambda_dr": 0.1}}, "did you mean lambda_diversity?"),
    "unclear_lambda": ({"ba_lora": {"lambda_x": 0.1}}, "lambda_consistency, lambda_diversity or lambda_svd"),
    "lambda_at_top": ({"lambda_2": 0.1}, "ba_lora.lambda_diversity"),
    "preset_at_top": ({"preset": "iclr2026"}, "ba_lora.preset"),
    "rank_in_block": ({"ba_lora": {"r": 16}}, "write lora_r there"),
    "compiled_how": ({"ba_lora": {"compile": "layer"}}, "write true, false or layers"),
    "two_lines_on_attention": ({"attn_implementation": "sdpa", "flash_attention": True}, "remove flash_attention"),
    "compiled_reentrant": (
        {
            "ba_lora": {"compile": True},
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "write use_reentrant: false",
    ),
    "compiled_twice": ({"ba_lora": {"compile": True}, "torch_compile": True}, "torch_compile: true"),
    "block_not_a_block": ({"ba_lora": True}, "ba_lora"),
    "negative": ({"ba_lora": {"lambda_svd": -1}}, "lambda_svd"),
    "nan": ({"ba_lora": {"lambda_svd": float("nan")}}, "lambda_svd"),
    "text": ({"ba_lora": {"lambda_svd": "much"}}, "lambda_svd"),
    "preset": ({"ba_lora": {"preset": "iclr"}}, "preset"),
    "form": ({"ba_lora": {"consistency": "forward"}}, "consistency"),
    "temperature": ({"ba_lora": {"temperature": 0}}, "temperature"),
    "top_k": ({"ba_lora": {"diversity_top_k": 1}}, "diversity_top_k=1"),
    "svd_top_k": ({"ba_lora": {"svd_top_k": 0}}, "svd_top_k"),
    "interval": ({"ba_lora": {"teacher_interval": 0}}, "teacher_interval"),
    "cache": ({"ba_lora": {"teacher_cache": ""}}, "teacher_cache"),
    "cache_top_k": ({"ba_lora": {"teacher_cache": "here", "teacher_cache_top_k": -1}}, "teacher_cache_top_k"),
    "cache_top_k_bool": ({"ba_lora": {"teacher_cache_top_k": True}}, "ba_lora.teacher_cache_top_k: true"),
    "cache_top_k_alone": ({"ba_lora": {"teacher_cache_top_k": 8}}, "teacher_cache_top_k=8 without teacher_cache"),
    "cache_top_k_top": ({"teacher_cache_top_k": 8}, "ba_lora.teacher_cache_top_k"),
    "compile": (
        {"adapter": "lora", "ba_lora": {"compile": True, "apply_to": "lora"}},
        "ba_lora.compile: true does not work with apply_to: lora",
    ),
    "layout": ({"ba_lora": {"svd_layout": "flattened", "svd_input": "centered_logits"}}, "svd_layout"),
    "rl": ({"rl": "dpo"}, "rl: dpo"),
    "reward_model": ({"reward_model": True}, "reward_model"),
    "flash_in_float32": ({"flash_attention": True}, "flash_attention"),
    "flash_implementation": ({"attn_implementation": "flash_attention_2"}, "attn_implementation: flash_attention_2"),
    "flash_without_a_gpu": (
        {"flash_attention": True, "bf16": "auto", "fp16": None},
        "flash_attention: true needs a GPU",
    ),
    "context_parallel": ({"context_parallel_size": 2}, "context_parallel_size: 2"),
    "rank_zero": ({"lora_r": 0}, "lora_r: 0"),
    "alpha_text": ({"lora_alpha": "16x"}, "lora_alpha: '16x'"),
    "parallel_text": ({"context_parallel_size": "2"}, "context_parallel_size: 2"),
    "misspelt_adapter": ({"adapter": "ba-lora"}, "did you mean ba_lora?"),
    "apply_to_qlora": ({"adapter": "qlora", "ba_lora": {"apply_to": "qlora"}}, "write adapter: ba_lora (of"),
    "nlu": ({"ba_lora": {"task": "nlu"}}, "ba_lora.task: nlu with model_type"),
    "full_without_teacher": ({"adapter": None, "ba_lora": {"apply_to": "full"}}, "write ba_lora.teacher_cache: <"),
    "mutating_start": (
        {"adapter": "lora", "ba_lora": {"apply_to": "lora"}, "peft_init_lora_weights": "pissa"},
        "peft_init_lora_weights: pissa",
    ),
    "weight_true": ({"ba_lora": {"lambda_svd": True}}, "ba_lora.lambda_svd: true"),
    "dora": ({"peft_use_dora": True}, "peft_use_dora"),
    "relora": ({"relora": True}, "relora"),
    "eaft": ({"use_eaft": True}, "use_eaft"),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_target_linear": True, "peft_layers_to_transform": [0]},
        {"lora_target_linear": True, "lora_target_modules": ["embed_positions"]},
        {"lora_target_linear": True, "lora_exclude_modules": ["down_proj"]},
        {"lora_target_modules": ["q_proj"], "peft_layers_to_transform": [1], "peft_layers_pattern": ["layers"]},
        {"lora_target_parameters": ["mlp.up_proj.weight"]},
        {"lora_target_modules": ["q_proj"], "lora_fan_in_fan_out": True, "lora_dropout": 0.2, "peft_use_rslora": True},
        {"lora_target_modules": ".*q_proj", "lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"q_proj": 3}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_the_adapters_config_is_axolotls_own(changes, written):
    """Field by field what Axolotl would make of the same keys for adapter: lora."""
    from axolotl.loaders.adapter import _build_peft_lora_config

    cfg = load_cfg(str(written(**{"lora_target_linear": None, **changes})))
    model = tiny_llama()
    ours, theirs = adapter_config(cfg, model).to_dict(), _build_peft_lora_config(model, cfg).to_dict()
    for key, value in theirs.items():
        if key == "init_lora_weights":
            continue
        same = set(ours[key] or ()) == set(value or ()) if isinstance(value, (list, set)) else ours[key] == value
        assert same or not (ours[key] or value), key


def test_the_final_config_is_checked_too(written):
    """What another plug-in's defaults or Axolotl's validation switch on is in no YAML."""
    cfg = load_cfg(str(written()))
    cfg.lora_mlp_kernel = True
    with pytest.raises(ValueError, match="lora_mlp_kernel"):
        BaLoraPlugin().pre_model_load(cfg)


def test_flash_attention_with_axolotls_default_precision_is_allowed():
    values = {"adapter": "ba_lora", "lora_r": 4, "lora_alpha": 4, "lora_target_linear": True, "flash_attention": True}
    checks.check_raw(values)
    with pytest.raises(ValueError, match="half precision"):
        checks.check_raw({**values, "bf16": False})


def test_another_plugins_trainer_is_refused(written):
    cfg = load_cfg(str(written()))
    with pytest.raises(ValueError, match="another plug-in's trainer"):
        BaLoraPlugin().post_trainer_create(cfg, object())


def test_checkpoints_of_another_kind_of_adapter_are_not_resumed(written):
    """Axolotl would overwrite files of the old run before it fails."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "auto_resume_from_checkpoints": True}
    lora = {"adapter": "lora", "ba_lora": None, **NO_KERNELS}
    for first, second, named in ((lora, {}, "adapter: lora"), ({}, lora, "adapter: ba_lora")):
        output = run(written(**settings, **first)).args.output_dir
        path = written(**settings, **second)
        with pytest.raises(ValueError, match=f"checkpoint-2 is a checkpoint of {named}"):
            load_model_and_tokenizer(cfg=load_cfg(str(path)))
        shutil.rmtree(output)


def test_a_random_start_follows_the_seed(written):
    first, second, other = (run(written(peft_init_lora_weights=True, seed=seed)) for seed in (3, 3, 4))
    assert history(first, "grad_norm") == history(second, "grad_norm") != history(other, "grad_norm")


def test_inference_without_an_adapter_is_refused(written):
    with pytest.raises(ValueError, match="lora_model_dir: is missing"):
        load_cfg(str(written()), inference=True)


def test_a_continued_adapter_keeps_its_shape(written):
    first = run(written())
    for key in ("lora_r", "lora_alpha"):
        path = written(lora_model_dir=first.args.output_dir, **{key: 8})
        with pytest.raises(ValueError, match=f"{key}: 8 contradicts"):
            load_model_and_tokenizer(cfg=load_cfg(str(path)))


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_yaml_gives_one_clear_line_before_the_model_loads(case, written):
    from axolotl.cli.main import cli
    from click.testing import CliRunner

    changes, words = WRONG[case]
    path = written(**changes)
    result = CliRunner().invoke(cli, ["train", str(path), "--launcher", "python"])
    assert result.exit_code == 1
    _, _, error = result.output.rpartition("Error: ")
    assert result.output.count("Error: ") == 1, result.output
    lines = [line for line in error.splitlines() if words in line]
    assert lines, result.output
    assert len(lines[0]) < 350  # the longest lists every field of the block
    assert "Traceback" not in result.output


def test_a_wrong_yaml_is_a_value_error_for_code(written):
    for case in ("no_rank", "misspelt_field", "negative", "rl"):
        changes, words = WRONG[case]
        with pytest.raises(ValueError, match=re.escape(words)):
            load_cfg(str(written(**changes)))


def test_a_wrong_yaml_is_one_line_under_a_launcher_too(written):
    """accelerate and torchrun run `python -m axolotl.cli.train`, outside click."""
    changes, words = WRONG["no_rank"]
    command = [sys.executable, "-m", "axolotl.cli.train", str(written(**changes))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert [words in line for line in found.stderr.splitlines() if line.startswith("Error: ")] == [True]


def test_what_only_the_loaded_model_tells_is_one_clear_error_before_the_first_step(workspace, written, tmp_path):
    spoilt = base_model(workspace)
    spoilt.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    spoilt.save_pretrained(tmp_path / "spoilt")
    shutil.copytree(
        workspace / "base", tmp_path / "spoilt", dirs_exist_ok=True, ignore=lambda *_: ["model.safetensors"]
    )
    words = "model.layers.1.mlp.up_proj.weight of the base model holds NaN"
    with pytest.raises(ValueError, match=re.escape(words)):
        load_model_and_tokenizer(cfg=load_cfg(str(written(base_model=str(tmp_path / "spoilt")))))


@pytest.mark.parametrize("option", ["--ba_lora.lambda-svd", "--ba-lora.lambda-svd=0.1", "--ba_lora__lambda_svd"])
def test_command_line_options_of_the_block_are_refused(option, written, monkeypatch):
    path = written()
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", str(path), option, "0.1"])
    with pytest.raises(ValueError, match="write it in the YAML"):
        load_cfg(str(path))


def test_the_subcommand_adds_the_plugins_line_and_delegates(written, tmp_path, ids, workspace):
    from axolotl.cli.main import cli
    from click.testing import CliRunner

    runner = CliRunner()
    path = written(plugins=None)
    result = runner.invoke(cli, ["ba-lora", "train", str(path), "--launcher", "python"])
    assert result.exit_code == 0, result.output[-2000:]
    resolved = yaml.safe_load((tmp_path / "out" / "ba_lora_config.yml").read_text())
    assert resolved["plugins"] == ["balora_plugin.BaLoraPlugin"]
    assert (tmp_path / "out" / "ba_lora.json").exists()
    stock = PeftModel.from_pretrained(base_model(workspace), tmp_path / "out").eval()
    assert (logits(stock, ids) - logits(base_model(workspace), ids)).abs().max() > 1e-3


def test_the_starter_and_the_schema(tmp_path, monkeypatch):
    from axolotl.cli.main import cli
    from click.testing import CliRunner

    from balora_plugin.hosts.axolotl.block import BaLoraBlock

    monkeypatch.setattr(sys, "argv", ["axolotl"])
    runner, path = CliRunner(), tmp_path / "start.yml"
    assert runner.invoke(cli, ["ba-lora", "init", str(path)]).exit_code == 0
    values = yaml.safe_load(path.read_text())
    assert (values["adapter"], values["plugins"]) == ("ba_lora", ["balora_plugin.BaLoraPlugin"])
    BaLoraBlock.model_validate(values["ba_lora"])
    assert values["sample_packing"] and values["attn_implementation"]  # or packed samples see each other
    again = runner.invoke(cli, ["ba-lora", "init", str(path)])
    assert again.exit_code == 1
    assert "--force" in again.output
    assert runner.invoke(cli, ["ba-lora", "schema", str(tmp_path / "schema.json")]).exit_code == 0
    whole = json.loads((tmp_path / "schema.json").read_text())
    assert whole == json.loads(runner.invoke(cli, ["ba-lora", "schema"]).output)
    schema = whole["properties"]["ba_lora"]
    assert schema["properties"].keys() == BaLoraBlock.model_fields.keys()
    assert all("description" in field for field in schema["properties"].values())


def test_auto_resume_from_checkpoints(written, ids, caplog):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(written(**settings))
    expected = logits(whole.model.eval(), ids)
    shutil.rmtree(Path(whole.args.output_dir) / "checkpoint-4")  # as if it had been killed after step 2
    path = written(**settings, auto_resume_from_checkpoints=True)
    cut_short = Path(whole.args.output_dir) / "checkpoint-3"  # and once more while it wrote this
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-2", cut_short)
    (cut_short / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3: trainer_state.json.*is missing.*checkpoint-2"):
        load_model_and_tokenizer(
            cfg=load_cfg(str(written("named.yml", **settings, resume_from_checkpoint=str(cut_short))))
        )
    cfg = load_cfg(str(path))
    load_model_and_tokenizer(cfg=cfg)
    assert cfg.resume_from_checkpoint == str(Path(whole.args.output_dir) / "checkpoint-2")
    with caplog.at_level("WARNING"):
        resumed = run(path)
    assert not [line for line in caplog.messages if "earlier run" in line]  # its own
    assert len(history(resumed, "loss")) == 4
    assert torch.equal(logits(resumed.model.eval(), ids), expected)


EXAMPLES = [*(ROOT / "example_configs").glob("*.yaml"), *(ROOT / "example_configs" / "multi_gpu").glob("*.yaml")]


@pytest.mark.parametrize("path", sorted(EXAMPLES), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_example_yamls_are_valid_and_build_their_adapter(path, workspace, written, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # as their paths are written
    monkeypatch.setattr("axolotl.cli.config.prepare_optim_env", lambda cfg: None)  # starts DeepSpeed
    values = yaml.safe_load(path.read_text())
    assert values["plugins"] == ["balora_plugin.BaLoraPlugin"]
    # what this machine lacks: the model, the data, a GPU
    here = {"base_model": str(workspace / "base"), "bf16": False, "output_dir": str(tmp_path / "out")}
    here |= {"datasets": [{"path": str(workspace / "data.jsonl"), "ds_type": "json", "type": "alpaca"}]}
    (tmp_path / "example.yml").write_text(yaml.safe_dump({**values, **here}))
    cfg = load_cfg(str(tmp_path / "example.yml"))
    assert values.keys() <= cfg.keys()  # Axolotl drops a key that its schema does not know
    config = adapter_config(cfg, tiny_llama())
    assert isinstance(config, BaLoraConfig)
    assert (config.r, config.lora_alpha) == (values["lora_r"], values["lora_alpha"])
    assert config.regularizers.preset == values["ba_lora"].get("preset", "paper")
    if "deepspeed" in values:
        assert cfg.deepspeed["zero_optimization"]["stage"] == int(path.stem[-1])  # the file was found and read


def test_the_readmes_yaml_trains(workspace, written, tmp_path):
    """The three added lines of the README in an otherwise working YAML."""
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    added = yaml.safe_load(blocks[0])
    assert added.keys() == {"plugins", "adapter", "ba_lora"}
    trainer = run(written(**added))
    assert history(trainer, "balora/consistency")[-1] > 0


def test_inference_answers(written, workspace):
    from axolotl.cli.main import cli
    from click.testing import CliRunner

    trained = run(written(max_steps=6)).args.output_dir
    untrained = str(workspace / "untrained")
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    get_ba_lora_model(base_model(workspace), config).save_pretrained(untrained)
    answers = []
    for adapter in (trained, untrained):
        path = written(lora_model_dir=adapter)
        result = CliRunner().invoke(cli, ["inference", str(path), "--launcher", "python"], input="What is 1 + 1?")
        assert result.exit_code == 0, result.output[-2000:]
        answers.append(result.output.rpartition("What is 1 + 1?")[2].split("=====")[0])
    assert answers[0] != answers[1]  # the adapter speaks, not the base


def quickstart_pairs():
    return [Instruction(f"m.f{i}", f"What does f{i} do?\n", f"It adds {i} to {i}.") for i in range(12)]


def test_the_quickstart_runs_axolotls_command_line(tmp_path, monkeypatch):
    """The example YAML's BA-LoRA run in a process of its own, read back by plain PEFT."""
    monkeypatch.chdir(ROOT)
    base = quickstart_base(tmp_path)
    pairs = tuple(quickstart_pairs())
    options = settings.FinetuningSettings(steps=3, batch=2, learning_rate=1e-2)
    with_axolotl.prepare(base, Corpus((), pairs, pairs), tmp_path)
    method = METHODS["ba-lora-visible"]
    trained = with_axolotl.finetune(method, base, options, tmp_path, progress=False)
    batches = measure.held_out_batches(pairs, base.load_tokenizer())
    found = measure.measure(trained.model, batches, measure.reference_logits(base.load_model(), batches))
    assert found.drift > 1e-4
    assert trained.largest_share() > 0
    assert trained.seconds_per_step > 0
    checked = check_reload(base, trained, batches[0], found)
    assert checked["reloaded"] < 1e-5
    assert checked["switched_off"] == 0


def quickstart_base(tmp_path):
    tiny = settings.PretrainingSettings(
        steps=3, vocabulary=300, hidden=16, intermediate=32, layers=2, heads=2, positions=256, chunk=16, batch=4
    )
    texts = [pair.prompt + pair.completion for pair in quickstart_pairs()]
    return tiny_model.base_model(tmp_path / "cache", texts, "digest", tiny, progress=False)


def test_the_quickstarts_yaml_is_its_settings(written, tmp_path, monkeypatch):
    """`make quickstart` runs example_configs/quickstart.yaml as it stands; its variants are the baselines."""
    monkeypatch.chdir(ROOT)
    standard = settings.REAL
    path = with_axolotl.config_file(METHODS["ba-lora"], standard, Path("outputs/quickstart"))
    assert path == with_axolotl.TEMPLATE
    for key, start, rate in (("lora", True, 4e-4), ("pissa", "pissa", 1e-4)):
        values = with_axolotl.config(METHODS[key], standard, tmp_path)
        assert values["learning_rate"] == rate
        assert (values["adapter"], values["peft_init_lora_weights"]) == ("lora", start)
        assert "ba_lora" not in values
    assert with_axolotl.config(METHODS["pissa-delta"], standard, tmp_path)["ba_lora"] == dict.fromkeys(RECOMMENDED, 0.0)
    assert with_axolotl.config(METHODS["ba-lora-visible"], standard, tmp_path)["ba_lora"]["lambda_svd"] == 0.02


def test_a_failing_quickstart_run_shows_its_last_lines(tmp_path):
    (tmp_path / "bad.yaml").write_text("base_model: x\nadapter: ba_lora\nplugins: [balora_plugin.BaLoraPlugin]\n")
    with pytest.raises(SystemExit, match="lora_r: is missing"):
        with_axolotl.watch(tmp_path / "bad.yaml", tmp_path / "log", 3, 1, "bad", progress=False)


@pytest.mark.parametrize("top_k", [None, pytest.param(96, marks=pytest.mark.long)])
def test_packed_epochs_are_served_from_the_teacher_cache(top_k, written, tmp_path):
    """Multipack composes its rows anew each epoch and leaves some documents out of the first. (96: all tokens.)"""
    settings = {**WORKS["packing"], "max_steps": None, "num_epochs": 3, "micro_batch_size": 1, "lora_dropout": 0.1}
    cached = {**TERMS, "teacher_cache": str(tmp_path / "cache"), "teacher_cache_top_k": top_k}
    live = run(written(**settings))
    cold = run(written(**settings, ba_lora=cached))
    warm = run(written(**settings, ba_lora=cached))
    assert len(warm.ba_lora_run.cache) == len(tokenised(written)) == 12
    assert warm.ba_lora_run.cache.runs == 0 < cold.ba_lora_run.cache.runs
    assert warm.ba_lora_run.cache.rows.kind == ("top_k" if top_k else "hidden")
    assert len(history(live, "loss")) > 3
    for key in ("loss", "grad_norm", "balora/consistency", "balora/loss"):
        assert history(warm, key) == history(cold, key), key
        torch.testing.assert_close(history(cold, key), history(live, key), rtol=3e-2, atol=1e-3, msg=key)


def test_the_card_keeps_axolotls_part_and_the_adapter_verifies(workspace, written, tmp_path):
    from balora_plugin.adapter.saved import card
    from balora_plugin.commands import main

    trainer = run(written(save_strategy="steps", save_steps=2))
    out = Path(trainer.args.output_dir)
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.count(card.START) == 1
    for words in ("Built with", "See axolotl config", "lora_target_linear: true", "### Training hyperparameters"):
        assert words in text
    assert card.START in (out / "checkpoint-2" / "README.md").read_text(encoding="utf-8")
    assert main(["verify", str(out), "--base", str(workspace / "base")]) == 0
    base_model(workspace)
    changed = AutoModelForCausalLM.from_pretrained(workspace / "base")
    changed.model.norm.weight.data[0] += 0.1
    changed.save_pretrained(tmp_path / "changed")
    assert main(["verify", str(out), "--base", str(tmp_path / "changed")]) == 1
    with pytest.raises(ValueError, match="belongs to another base"):
        run(
            written(
                base_model=str(tmp_path / "changed"),
                lora_model_dir=str(out),
                output_dir=str(tmp_path / "second"),
                tokenizer_config=str(workspace / "base"),
            )
        )
