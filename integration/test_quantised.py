"""Truly 4-bit and 8-bit bases through TRL and transformers: loss, evaluation, saving and resuming."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from helpers import TERMS, assert_stored_weights, logits, quantised_layers, stored_weights
from models import QUANTISED, load_quantised, tiny_llama
from peft import PeftModel
from transformers import BitsAndBytesConfig, DataCollatorForLanguageModeling, TrainerCallback, TrainingArguments
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, BaLoraTrainer
from balora_plugin.adapter.delta import delta_layers_of
from balora_plugin.adapter.saved.reading import copy_factors
from balora_plugin.adapter.saved.stock import delta_layers
from balora_plugin.pretrained.switch import TeacherSwitch

pytest.importorskip("bitsandbytes")

TEXTS = [f"The number {i} comes before {i + 1}" + " and so on" * (i % 3) for i in range(12)]
KINDS = ["nf4_double", "int8"]
HOSTS = ["trl", "transformers"]
LOGGED = ("loss", "grad_norm", "balora/task", "balora/consistency", "balora/diversity", "balora/svd")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("quantised") / "base"
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def adapter(**changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "regularizers": TERMS}
    return BaLoraConfig(**{**values, **changes})


@pytest.fixture
def build(base, tmp_path, tokenizer):
    """A trainer of one of the hosts over a quantised base; changes of the adapter stand in `peft`."""

    def built(host, kind, model=None, peft=None, callbacks=None, **changes):
        values = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 1,
        }
        model = load_quantised(base, kind) if model is None else model
        common = {"model": model, "peft_config": adapter(**(peft or {})), "callbacks": callbacks}
        if host == "trl":
            rows = Dataset.from_list([{"text": text} for text in TEXTS])
            return BaLoraSFTTrainer(
                args=SFTConfig(**{**values, "bf16": False, "gradient_checkpointing": False, **changes}),
                train_dataset=rows,
                eval_dataset=rows.select(range(4)),
                processing_class=copy.deepcopy(tokenizer),
                **common,
            )
        rows = Dataset.from_list([tokenizer(text) for text in TEXTS])
        return BaLoraTrainer(
            args=TrainingArguments(**{**values, **changes}),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
            **common,
        )

    return built


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


class Speaks(TrainerCallback):
    """Generates after every evaluation, in eval mode, as hosts' callbacks do."""

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        model.eval()
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_trains_evaluates_and_saves(host, kind, build, base, ids, tmp_path):
    trainer = build(host, kind, eval_strategy="steps", eval_steps=1, callbacks=[Speaks()])
    before = stored_weights(load_quantised(base, kind))
    assert before.keys() == {name for name, _ in delta_layers_of(trainer.model)}
    assert len(before) == 14
    trainer.train()
    assert history(trainer, "balora/consistency")[0] == 0
    assert history(trainer, "balora/consistency")[-1] > 1e-3
    assert history(trainer, "eval_loss")[-1] < history(trainer, "eval_loss")[0]
    # neither the check at construction, nor evaluations, nor generating touched the base
    assert_stored_weights(trainer.model, before)
    model = trainer.model.train()
    untouched = logits(load_quantised(base, kind), ids)
    with TeacherSwitch(model).off():
        assert torch.equal(model(input_ids=ids).logits, untouched)
    # SFTTrainer casts what trains over a quantised base to bfloat16, and the frozen factors follow
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name or "frozen_" in name}
    assert dtypes == {torch.bfloat16 if host == "trl" else torch.float32}
    expected = logits(model, ids)
    moved = (expected - untouched).abs().max()
    assert moved > 0.1
    trainer.save_model(str(tmp_path / "adapter"))
    stock = PeftModel.from_pretrained(load_quantised(base, kind), tmp_path / "adapter").train()
    # bfloat16 factors: A0 + dA is rounded once in the file, where training adds two products
    tolerance = 0.01 * moved if host == "trl" else 1e-5
    assert (logits(stock, ids) - expected).abs().max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_evaluations_change_nothing(host, kind, build):
    """Naively, an evaluation leaves 4-bit weights repacked and every later gradient wrong."""
    plain, evaluated = build(host, kind), build(host, kind, eval_strategy="steps", eval_steps=1, callbacks=[Speaks()])
    plain.train()
    evaluated.train()
    for key in LOGGED:
        assert len(history(plain, key)) == 4
        assert history(evaluated, key) == history(plain, key), key


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_run_is_that_of_the_dequantised_model(kind, build, base):
    trainer = build("transformers", kind, eval_strategy="steps", eval_steps=1)
    reference = build(
        "transformers", kind, model=load_quantised(base, kind).dequantize(), eval_strategy="steps", eval_steps=1
    )
    assert not quantised_layers(reference.model)
    factors = {
        name: {key: getattr(layer, key)["default"].weight for key in ("frozen_A", "frozen_B")}
        for name, layer in delta_layers(trainer.model, "default")
    }
    copy_factors(reference.model, "default", factors)  # a factorisation of its own may turn the other way
    trainer.train()
    reference.train()
    for key in (*LOGGED, "eval_loss", "eval_balora/consistency"):
        torch.testing.assert_close(history(trainer, key), history(reference, key), rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", HOSTS)
def test_resuming_equals_the_uninterrupted_run(host, kind, build):
    settings = {"save_strategy": "steps", "save_steps": 2, "peft": {"lora_dropout": 0.1}}
    whole = build(host, kind, **settings)
    whole.train()
    resumed = build(host, kind, **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    for key in LOGGED:
        assert history(resumed, key)[-2:] == history(whole, key)[-2:], key
    ends = [{k: v for k, v in t.model.state_dict().items() if "lora_" in k or "frozen_" in k} for t in (whole, resumed)]
    assert len(ends[0]) == 14 * 4
    assert all(torch.equal(ends[1][key], value) for key, value in ends[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_cache_over_a_quantised_base(kind, build, tmp_path):
    cached = {"regularizers": dataclasses.replace(TERMS, teacher_cache=tmp_path / "cache")}
    runs = []
    for peft in (None, cached, cached):
        runs.append(build("transformers", kind, peft=peft))
        runs[-1].train()
    live, cold, warm = runs
    assert warm.ba_lora_run.cache.runs == 0 < cold.ba_lora_run.cache.runs
    for key in LOGGED:
        assert history(warm, key) == history(cold, key), key
        torch.testing.assert_close(history(cold, key), history(live, key), rtol=3e-2, atol=1e-3, msg=key)


def test_a_model_by_name_with_a_quantization_config(build, base):
    """TRL loads it; A0 and B0 come from the full-precision files it was quantised from."""
    config = BitsAndBytesConfig(**QUANTISED["nf4_double"])
    trainer = BaLoraSFTTrainer(
        model=str(base),
        quantization_config=config,
        args=build("trl", "nf4_double").args,
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        peft_config=adapter(start_from=base),
    )
    assert len(quantised_layers(trainer.model)) == 14
    trainer.train()
    assert history(trainer, "balora/consistency")[0] == 0
    from_files = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.frozen_A["default"].weight
    own = build("trl", "nf4_double").model.get_base_model().model.layers[0].self_attn.q_proj.frozen_A["default"].weight
    weight = dict(tiny_llama(hidden_size=64, intermediate_size=128).named_modules())["model.layers.0.self_attn.q_proj"]
    rows = torch.linalg.svd(weight.weight.detach())[2][:4]

    def part_outside(a):
        a = a.detach().float()
        return ((a - a @ rows.T @ rows).norm() / a.norm()).item()

    assert part_outside(from_files) < 0.01 < 0.05 < part_outside(own)
