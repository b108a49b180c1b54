"""`teacher_pass: by_layer` in a trainer: the run of a whole teacher, to the bit, and what its cost report says."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch
from helpers import TERMS
from models import tiny_llama

from balora_plugin import BaLoraTrainer
from balora_plugin.training.sharing import by_layer_report

from .histories import rows_of
from .test_trainer import TEXTS, adapter, build, history

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
RUNS = {
    "plain": ({}, {}),
    "reentrant": ({}, REENTRANT),
    "interval": ({"teacher_interval": 2}, {"gradient_accumulation_steps": 2}),
    "anchors": ({"anchor_data": TEXTS[:3]}, {"gradient_checkpointing": True}),
    "drift": ({"drift_target": 0.05, "monitor": True}, {}),
}


def made(tmp_path, tokenizer, way, terms, layers=None, **settings):
    regularizers = dataclasses.replace(TERMS, teacher_pass=way, share_interval=1, **terms)
    config = adapter(regularizers=regularizers, lora_dropout=0.2, **(layers or {}))
    cls = partial(BaLoraTrainer, processing_class=tokenizer)
    return build(tmp_path / way, tokenizer, cls=cls, peft_config=config, **settings)


def trained(*what, resume=None, **settings):
    trainer = made(*what, **settings)
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    return trainer


def assert_same_run(found, expected):
    assert rows_of(found.state.log_history) == rows_of(expected.state.log_history)
    assert history(found, "grad_norm") == history(expected, "grad_norm")
    weights = dict(expected.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in found.model.named_parameters())


def report_of(tmp_path, way="by_layer"):
    return json.loads((tmp_path / way / "out" / "ba_lora_cost.json").read_text())["teacher_by_layer"]


@pytest.mark.parametrize("case", RUNS)
def test_a_run_is_the_one_of_a_whole_teacher(case, tmp_path, tokenizer):
    terms, settings = RUNS[case]
    whole, found = (trained(tmp_path, tokenizer, way, terms, **settings) for way in ("whole", "by_layer"))
    assert_same_run(found, whole)
    by_layer = found.ba_lora_run.by_layer
    teachers = 4  # one a step, with an interval of as many micro-batches as are accumulated too
    assert (by_layer.why, by_layer.passes) == ("", teachers - 1 + 1)  # the first proves it; one batch is evaluated
    report = report_of(tmp_path)
    assert report == {"layers": 2, "passes": teachers - 1, "gathered_less_gib": 0.0, "why": ""}
    assert report_of(tmp_path, "whole") is None


def test_layers_below_the_adapter_are_shared_beside(tmp_path, tokenizer):
    layers = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}
    whole, found = (trained(tmp_path, tokenizer, way, {}, layers=layers) for way in ("whole", "by_layer"))
    assert_same_run(found, whole)
    assert (found.ba_lora_run.by_layer.passes, found.ba_lora_run.shared.passes) == (4, 4)


def test_a_run_that_is_resumed_is_the_whole_one(tmp_path, tokenizer):
    saves = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path, tokenizer, "whole", {}, **saves)
    checkpoint = str(tmp_path / "whole" / "out" / "checkpoint-2")
    found = trained(tmp_path, tokenizer, "by_layer", {}, resume=checkpoint, **saves)
    assert_same_run(found, whole)
    assert found.ba_lora_run.by_layer.passes == 1 + 1


def test_arguments_that_have_changed_since_tell_rows_apart(tmp_path, tokenizer, caplog):
    """Asked again when training begins: with fewer micro-batches a step the teacher meets some rows of each."""
    layers = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    given = {"gradient_accumulation_steps": 2, "layers": layers}
    trainer = made(tmp_path, tokenizer, "by_layer", {"teacher_interval": 2}, **given)
    assert trainer.ba_lora_run.by_layer.why == ""
    trainer.args.gradient_accumulation_steps = 1
    trainer.train()
    by_layer = trainer.ba_lora_run.by_layer
    assert by_layer.passes == 0 and by_layer.why.startswith("teacher_interval=2 gives it some rows")
    assert sum("by_layer does not act" in record.message for record in caplog.records) == 1


APART = {
    "cache": "the teacher's outputs come from teacher_cache",
    "second": "the teacher is a model of its own",
    "compiled": "compile: layers compiles the layers' own forward",
    "rows": "teacher_interval=4 gives it some rows of a micro-batch: accumulate a multiple of 4",
}


@pytest.mark.parametrize("case", APART)
def test_where_it_cannot_be_the_teacher_has_a_pass_of_its_own(case, tmp_path, tokenizer, caplog):
    terms = {"cache": {"teacher_cache": str(tmp_path / "cache")}, "rows": {"teacher_interval": 4}}.get(case, {})
    settings = {"teacher_model": tiny_llama()} if case == "second" else {}
    settings |= {"layers": {"compile": "layers"}} if case == "compiled" else {}
    run = made(tmp_path, tokenizer, "by_layer", terms, **settings).ba_lora_run
    assert by_layer_report(run) == {"layers": 2, "passes": 0, "gathered_less_gib": 0.0, "why": APART[case]}
    said = [record.message for record in caplog.records if "by_layer does not act" in record.message]
    assert len(said) == 1
    assert said[0].endswith(f"the teacher runs in a pass of its own: {APART[case]}.")
