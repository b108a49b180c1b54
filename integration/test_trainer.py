"""BaLoraTrainer and the mixin on transformers' own Trainer."""

from __future__ import annotations

import copy
import dataclasses
import json
import math

import pytest
import torch
from datasets import Dataset
from helpers import TERMS, assert_base_untouched, ba_lora, base_parameters, logits, stock
from models import tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from balora_plugin import BaLoraConfig, BaLoraTrainer, BaLoraTrainerMixin, RegularizerConfig, get_ba_lora_model
from balora_plugin.checkpoint import integrity

TEXTS = [f"The number {i} comes before {i + 1}" + " and so on" * (i % 3) for i in range(12)]


def adapter(**changes):
    values = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "regularizers": TERMS}
    return BaLoraConfig(**{**values, **changes})


def arguments(tmp_path, **changes):
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
    return TrainingArguments(**{**values, **changes})


def build(tmp_path, tokenizer, model=None, cls=BaLoraTrainer, **changes):
    trainer_keys = ("peft_config", "regularizers", "teacher_model", "compute_metrics")
    extra = {key: changes.pop(key) for key in trainer_keys if key in changes}
    rows = Dataset.from_list([tokenizer(text) for text in TEXTS])
    return cls(
        model=tiny_llama() if model is None else model,
        args=arguments(tmp_path, **changes),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
        **extra,
    )


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.mark.parametrize("kind", ["ba_lora", "lora"])
@pytest.mark.parametrize(
    ("trains", "owner"), [("model.norm.weight", "norm"), ("lm_head.weight", "lm_head"), ("0.mlp.up_proj", "up_proj")]
)
def test_a_base_parameter_that_trains_beside_the_adapter_is_refused(trains, owner, kind, tmp_path, tokenizer):
    """The teacher shares it: consistency would be measured against a moving model, and a teacher cache poisoned."""
    extra = {} if kind == "ba_lora" else {"regularizers": TERMS}

    def adapted():
        model = ba_lora(tiny_llama(), regularizers=TERMS) if kind == "ba_lora" else stock(tiny_llama())
        for name, p in model.named_parameters():
            if trains in name and "lora_" not in name and "frozen_" not in name:
                p.requires_grad_(True)
        return model

    with pytest.raises(ValueError, match=rf"trains beside the adapter.*modules_to_save=\['{owner}'\].*teacher_model"):
        build(tmp_path, tokenizer, model=adapted(), **extra)
    assert build(tmp_path, tokenizer, model=adapted(), teacher_model=tiny_llama(), **extra).ba_lora is not None
    terms = RegularizerConfig(lambda_consistency=0.0, lambda_diversity=0.1, lambda_svd=0.0)
    assert build(tmp_path, tokenizer, model=adapted(), regularizers=terms).ba_lora is not None


@pytest.mark.parametrize(
    "changes",
    [{"modules_to_save": ["norm", "lm_head"], "target_modules": ["q_proj"]}, {"target_modules": "all-linear"}],
)
@pytest.mark.parametrize("kind", ["ba_lora", "lora"])
def test_what_is_switched_off_with_the_adapter_may_train(kind, changes, tmp_path, tokenizer):
    config = adapter(**changes)
    if kind == "lora":
        config = LoraConfig(r=4, task_type="CAUSAL_LM", **changes)
    trainer = build(tmp_path, tokenizer, peft_config=config, regularizers=TERMS)
    assert trainer.ba_lora.lambda_consistency


@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains_saves_and_leaves_the_base_alone(model, checkpointing, tmp_path, tokenizer, ids):
    base = model(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    before = base_parameters(base)
    trainer = build(
        tmp_path,
        tokenizer,
        model=base,
        peft_config=adapter(lora_dropout=0.1),
        gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert history(trainer, "balora/consistency")[0] == 0
    assert history(trainer, "balora/consistency")[-1] > 1e-6
    assert_base_untouched(trainer.model, before)
    result = trainer.evaluate()
    assert math.isfinite(result["eval_balora/loss"])
    trainer.save_model(str(tmp_path / "adapter"))
    stock = PeftModel.from_pretrained(model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(stock, ids), logits(trainer.model.eval(), ids), rtol=0, atol=1e-5)


SETTINGS = {
    "plain": ({}, ""),
    "reentrant": ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, ""),
    "cache": ({}, "the teacher's outputs come from teacher_cache"),
    "second": ({}, "the teacher is a model of its own"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_layers_below_the_adapter_are_shared_and_give_the_same_run(case, tmp_path, tokenizer):
    settings, why = SETTINGS[case]
    more = {"teacher_cache": str(tmp_path / "cache")} if case == "cache" else {}
    runs = []
    for teacher_pass in ("whole", "shared"):
        terms = dataclasses.replace(TERMS, teacher_pass=teacher_pass, **more)
        config = adapter(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], regularizers=terms)
        extra = {"teacher_model": tiny_llama()} if case == "second" else {}
        trainer = build(tmp_path, tokenizer, peft_config=config, **settings, **extra)
        trainer.train()
        trainer.evaluate()
        runs.append(trainer)
    whole, shared = runs
    for key in ("loss", "grad_norm", "balora/consistency", "balora/svd", "eval_balora/consistency"):
        assert history(shared, key) == history(whole, key)
    report = json.loads((tmp_path / "out" / "ba_lora_cost.json").read_text())["shared_layers"]
    assert report == {"layers": 0 if why else 1, "of": 2, "passes": 0 if why else 3, "why": why}
    assert whole.ba_lora_run.shared.why == "teacher_pass='whole'"


def test_checkpointing_and_accumulation_give_the_same_run(tmp_path, tokenizer):
    runs = [
        build(tmp_path, tokenizer, peft_config=adapter(), **settings)
        for settings in (
            {},
            {"gradient_checkpointing": True},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        )
    ]
    for trainer in runs:
        trainer.train()
    for key in ("loss", "grad_norm", "balora/consistency", "balora/svd"):
        for trainer in runs[1:]:
            torch.testing.assert_close(history(trainer, key), history(runs[0], key), rtol=1e-5, atol=1e-6)


def test_an_already_wrapped_model_any_adapter_and_no_adapter(tmp_path, tokenizer):
    wrapped = build(tmp_path, tokenizer, model=ba_lora(tiny_llama(), regularizers=TERMS))
    wrapped.train()
    assert history(wrapped, "balora/consistency")[-1] > 0
    config = LoraConfig(r=4, target_modules=["q_proj"])
    plain = build(tmp_path, tokenizer, peft_config=config, regularizers=TERMS)
    plain.train()
    assert history(plain, "balora/consistency")[0] == 0
    off = build(tmp_path, tokenizer, peft_config=config)
    off.train()
    assert off.ba_lora is None
    terms = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.1, lambda_svd=0.1)
    full = build(tmp_path, tokenizer, regularizers=terms, teacher_model=tiny_llama())
    full.train()
    assert history(full, "balora/consistency")[0] == pytest.approx(0, abs=1e-9)


def test_the_mixin_on_any_trainer_subclass(tmp_path, tokenizer):
    class Custom(BaLoraTrainerMixin, Trainer):
        pass

    custom = build(tmp_path, tokenizer, cls=Custom, model=ba_lora(tiny_llama(), regularizers=TERMS))
    ours = build(tmp_path, tokenizer, model=ba_lora(tiny_llama(), regularizers=TERMS))
    custom.train(), ours.train()
    assert history(custom, "loss") == history(ours, "loss")


def test_a_subclass_with_the_hooks(tmp_path, tokenizer):
    """What subclass authors may override: the task, a batch's keywords, and metrics of their own."""

    class Custom(BaLoraTrainer):
        def __init__(self, *args, **kwargs):
            self.checked, self.passes, self.counted = [], [], 0.0
            super().__init__(*args, **kwargs)

        def check_ba_lora_task(self, config):
            self.checked.append(config.task)
            if config.consistency == "mse":
                raise ValueError("consistency='mse' is not for this trainer: write 'kl'.")

        def extend_ba_lora_inputs(self, inputs):
            return {**inputs, "output_attentions": False}

        def record_ba_lora_metrics(self, out, inputs, training):
            self.passes.append((training, inputs["output_attentions"]))
            self.counted += out.count.item()

    custom = build(tmp_path, tokenizer, cls=Custom, peft_config=adapter())
    custom.train()
    custom.evaluate()
    assert custom.checked == ["nlg"]
    assert custom.passes == [(True, False)] * 4 + [(False, False)]
    plain = build(tmp_path, tokenizer, peft_config=adapter())
    plain.train()
    assert history(custom, "loss") == history(plain, "loss")
    batches = [*custom.get_train_dataloader(), *custom.get_eval_dataloader()]
    assert custom.counted == sum((batch["labels"][:, 1:] != -100).sum().item() for batch in batches[:4] + batches[-1:])
    with pytest.raises(ValueError, match=r"consistency='mse' is not for this trainer"):
        build(tmp_path, tokenizer, cls=Custom, peft_config=adapter(regularizers=RegularizerConfig(consistency="mse")))


@pytest.mark.parametrize("name", ["_extend_inputs", "_record_host_metrics", "_ba_lora_check_task"])
def test_a_hook_under_an_earlier_name_is_refused(name, tmp_path, tokenizer):
    earlier = type("Earlier", (BaLoraTrainer,), {name: lambda self, *args: None})
    with pytest.raises(TypeError, match=rf"Earlier.{name} is not called any more: name it \w*ba_lora"):
        build(tmp_path, tokenizer, cls=earlier, peft_config=adapter())


def test_a_run_has_one_state(tmp_path, tokenizer):
    trainer = build(tmp_path, tokenizer, peft_config=adapter())
    run = trainer.ba_lora_run
    assert trainer.ba_lora is run.config and trainer.ba_lora_metrics is run.metrics
    assert run.config.temperature is not None  # resolved
    assert run.ours and run.model is trainer.model.get_base_model()
    trainer.model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.model.set_adapter("other")
    assert not run.ours and run.adapter.r == 2  # what is active now
    trainer.extend_ba_lora_inputs = lambda inputs: {**inputs, "later": True}
    assert run.inputs({"input_ids": torch.ones(1, 2, dtype=torch.long), "_note": 1}).keys() == {"input_ids", "later"}
    plain = Trainer(model=tiny_llama(), args=trainer.args)
    del trainer.extend_ba_lora_inputs
    public = {"ba_lora_run", "ba_lora_requests", "ba_lora_head_checked", "model_accepts_loss_kwargs"}
    ours = public | {"_given", "_sealing", "_untrained"} | {"_adapter", "_wanted", "_arguments"}  # for model_init
    assert vars(trainer).keys() - vars(plain).keys() <= ours
    without = build(tmp_path, tokenizer, peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    assert without.ba_lora_run is None and without.ba_lora is None
    with pytest.raises(AttributeError, match="no BA-LoRA terms"):
        without.ba_lora_metrics  # noqa: B018


def test_compute_metrics_and_resume(tmp_path, tokenizer, ids):
    def metrics(prediction):
        assert prediction.predictions.shape[-1] == 96
        return {"first": float(prediction.predictions[0, 0, 0])}

    settings = {"save_strategy": "steps", "save_steps": 2, "peft_config": adapter(), "compute_metrics": metrics}
    whole = build(tmp_path, tokenizer, **settings)
    whole.train()
    assert "eval_first" in whole.evaluate()
    resumed = build(tmp_path, tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert torch.equal(logits(resumed.model.eval(), ids), logits(whole.model.eval(), ids))


def test_an_evaluation_in_between_does_not_take_the_training_terms(tmp_path, tokenizer):
    def run(evaluate):
        class Custom(BaLoraTrainer):
            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                if evaluate and self.state.global_step == 1:
                    self.evaluate(metric_key_prefix="valid")
                return loss

        trainer = build(tmp_path, tokenizer, cls=Custom, peft_config=adapter(), logging_steps=2)
        trainer.train()
        return trainer

    rows = [row for row in run(True).state.log_history if "valid_loss" in row]
    assert rows
    assert not any(key.startswith("balora/") for row in rows for key in row)
    assert all("valid_balora/task" in row for row in rows)
    assert history(run(True), "balora/task") == history(run(False), "balora/task")


def test_an_adapter_on_the_lm_head_is_refused(tmp_path, tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="LM head"):
        build(tmp_path, tokenizer, peft_config=config, regularizers=TERMS)


def test_a_teacher_with_adapters_of_its_own(tmp_path, tokenizer):
    teacher = ba_lora(tiny_llama())
    trainer = build(tmp_path, tokenizer, regularizers=TERMS, teacher_model=teacher)
    trainer.train()
    assert history(trainer, "balora/consistency")[0] == pytest.approx(0, abs=1e-9)


def test_a_ba_lora_checkpoint_is_not_resumed_into_a_plain_lora(tmp_path, tokenizer):
    """Its file has rank 2r, its optimizer state rank r: AdamW would run past the end of the moments."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    build(tmp_path, tokenizer, peft_config=adapter(), **settings).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    for rank in (4, 8):
        plain = build(tmp_path, tokenizer, peft_config=LoraConfig(r=rank, target_modules="all-linear"), **settings)
        for given in (checkpoint, True):
            with pytest.raises(ValueError, match="is a BA-LoRA checkpoint"):
                plain.train(resume_from_checkpoint=given)


def test_another_adapters_checkpoint_is_not_resumed_into_ba_lora(tmp_path, tokenizer):
    """It is whole, and no BA-LoRA run that was cut short."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    build(tmp_path, tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear"), **settings).train()
    ours = build(tmp_path, tokenizer, peft_config=adapter(), **settings)
    with pytest.raises(ValueError, match="is a checkpoint of another adapter than BA-LoRA"):
        ours.train(resume_from_checkpoint=True)


def test_settings_as_a_dict(tmp_path, tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = build(tmp_path, tokenizer, peft_config=config, regularizers={"lambda_svd": 0.25})
    assert trainer.ba_lora.lambda_svd == 0.25


def test_models_without_an_lm_head_are_refused(tmp_path, tokenizer):
    from transformers import AutoModel, AutoModelForTokenClassification

    config = tiny_llama().config
    for model in (AutoModel.from_config(config), AutoModelForTokenClassification.from_config(config)):
        with pytest.raises(ValueError, match="not a causal language model"):
            build(tmp_path, tokenizer, model=model, peft_config=adapter(target_modules=["q_proj"]))


class Poison(TrainerCallback):
    """Makes one value of the loss NaN or inf from an optimizer step on."""

    def __init__(self, name, step, value):
        self.name, self.step, self.value = name, step, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 != self.step:
            return
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        if self.name == "task":  # the student alone: the teacher would be NaN with the base
            layer.lora_B["default"].weight.data[0, 0] = self.value
        elif self.name in ("svd", "diversity"):  # nothing in a model spoils one of them alone
            metrics, bad = self.trainer.ba_lora_metrics, torch.tensor(self.value)
            record = metrics.record
            metrics.record = lambda out, *rest: record(dataclasses.replace(out, **{self.name: bad}), *rest)
        else:
            self.trainer.ba_lora_run.teacher = copy.deepcopy(tiny_llama()).eval()
            self.trainer.ba_lora_run.teacher.lm_head.weight.data[5] = self.value


@pytest.mark.parametrize(
    ("name", "value", "logging", "stops_at"),
    [
        ("task", math.nan, 1, 3),
        ("task", math.inf, 100, 4),
        ("consistency", math.nan, 100, 4),
        ("diversity", math.nan, 1, 3),
        ("svd", math.inf, 100, 4),
    ],
)
def test_a_term_that_is_not_finite_stops_the_run_before_anything_is_saved(
    name, value, logging, stops_at, tmp_path, tokenizer
):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "save_total_limit": 1}
    poison = Poison(name, 3, value)
    trainer = build(tmp_path, tokenizer, peft_config=adapter(), logging_steps=logging, **settings)
    trainer.add_callback(poison)
    poison.trainer = trainer
    with pytest.raises(FloatingPointError, match=rf"balora/{name}: .* NaN or inf at step 3\b") as caught:
        trainer.train()
    assert trainer.state.global_step == stops_at  # at the log, or else at the checkpoint
    good = tmp_path / "out" / "checkpoint-2"
    assert str(good) in str(caught.value)
    assert integrity.checkpoint_flaw(str(good)) is None
    assert not (tmp_path / "out" / "checkpoint-4").exists()


def test_a_run_whose_adapter_has_another_name_resumes(tmp_path, tokenizer):
    def made():
        model = get_ba_lora_model(tiny_llama(), adapter(), adapter_name="mine")
        return build(tmp_path, tokenizer, model=model, save_strategy="steps", save_steps=2)

    through = made()
    through.train()
    expected = {name: p.clone() for name, p in through.model.state_dict().items() if "lora_" in name}
    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    found = resumed.model.state_dict()
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    (tmp_path / "out" / "checkpoint-4" / "mine" / "ba_lora.json").unlink()
    with pytest.raises(ValueError, match=r"'mine': ba_lora\.json.*checkpoint-2"):
        made().train(resume_from_checkpoint=True)


def test_what_trains_is_said_once_a_training_in_four_lines(tmp_path, tokenizer, capsys):
    trainer = build(
        tmp_path, tokenizer, peft_config=adapter(target_modules=["q_proj"]), max_steps=1, disable_tqdm=False
    )
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("BA-LoRA: start pissa in delta form, rank 4") == 1
    assert "  trains   512 of " in out and "self_attn.q_proj; left out" in out
