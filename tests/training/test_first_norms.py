"""A PiSSA start at a LoRA's learning rate is said with a rate to try, a term that hardly acts with a weight to try."""

from __future__ import annotations

import logging
import re
import statistics

import pytest
from classifiers import classifier
from models import tiny_llama
from test_acting import arguments, samples, tokens

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from balora_plugin.config import RECOMMENDED_RATE
from balora_plugin.training.first_norms import FirstNorms

pytestmark = pytest.mark.hosts

OFF = {"lambda_consistency": 0.0, "lambda_diversity": 0.0, "lambda_svd": 0.0}


@pytest.fixture
def said(caplog):
    """The BA-LoRA warnings so far."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING)
    return lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("BA-LoRA: ")]


def trained(tmp_path, terms=OFF, start="pissa", **changes):
    config = BaLoraConfig(
        r=2,
        lora_alpha=2,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=start,
        regularizers=RegularizerConfig(**terms),
    )
    args = arguments(tmp_path, **{"max_steps": 6, "learning_rate": 2e-4, **changes})
    trainer = BaLoraTrainer(model=tiny_llama(), args=args, train_dataset=tokens(24), peft_config=config)
    trainer.train()
    return trainer


def test_norms_far_above_the_clip_are_said_with_a_rate(tmp_path, said):
    trainer = trained(tmp_path, max_grad_norm=1e-3)
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == 6
    (line,) = [line for line in said() if "gradient norm" in line]
    assert f"is {statistics.median(norms[:5]):.3g} (median)" in line and "max_grad_norm=0.001" in line
    assert "learning_rate=0.0002 is a LoRA's" in line and f"Try learning_rate={RECOMMENDED_RATE:g}" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"learning_rate": RECOMMENDED_RATE},
        {"max_grad_norm": 1e3},
        {"max_grad_norm": 0.0},
        {"start": True},
        {"max_steps": 4},
    ],
    ids=str,
)
def test_what_is_no_such_run_is_not_said(changes, tmp_path, said):
    trained(tmp_path, **{"max_grad_norm": 1e-3, **changes})
    assert not any("gradient norm" in line for line in said())


def test_a_resumed_runs_norms_are_no_first_ones():
    said = []
    norms = FirstNorms("pissa", 1.0, 1e-3, lambda key, message: said.append(message))
    for step in range(7, 17):
        norms.add(step, 50.0)
    assert not said
    for step in range(5):
        norms.add(step, 50.0)
    assert len(said) == 1


def test_the_weight_that_is_named_carries_a_hundredth_of_the_gradient(tmp_path, said):
    measured = {"share_interval": 1, "svd_top_k": 2}
    trained(tmp_path, {**OFF, "lambda_svd": 1e-7, **measured}, max_steps=11)
    (line,) = [line for line in said() if "hardly act" in line]
    needed = float(re.search(r"lambda_svd=1e-07 \(\S+; (\S+) would carry 1%\)", line)[1])
    trainer = trained(tmp_path, {**OFF, "lambda_svd": needed, **measured}, max_steps=11)
    share = next(row["balora/share_svd"] for row in trainer.state.log_history if "balora/share_svd" in row)
    assert share == pytest.approx(0.01, rel=0.6)  # the weight has one digit
    assert len([line for line in said() if "hardly act" in line]) == 1


@pytest.mark.parametrize(("steps", "rate"), [(10, 2e-4), (12, 0.0)])
def test_a_student_that_still_is_the_teacher_is_not_judged(steps, rate, tmp_path, said):
    terms = {**OFF, "lambda_consistency": 0.3, "share_interval": 1}
    trainer = trained(tmp_path, terms, max_steps=steps, learning_rate=rate, warmup_steps=2)
    assert any("balora/share_consistency" in row for row in trainer.state.log_history)
    assert not [line for line in said() if "hardly act" in line]


def test_a_consistency_too_small_to_act_is_judged_once_the_weights_have_moved(tmp_path, said):
    trained(
        tmp_path,
        {**OFF, "lambda_consistency": 1e-6, "share_interval": 1},
        max_steps=12,
        learning_rate=1e-2,
        warmup_steps=2,
    )
    (line,) = [line for line in said() if "hardly act" in line]
    assert "lambda_consistency=1e-06 (" in line and "would carry 1%" in line


@pytest.mark.parametrize(("labels", "remedy"), [(1, "has 1 output: set"), (3, "Raise the batch size, set")])
def test_a_larger_batch_is_no_remedy_for_a_single_output(labels, remedy, tmp_path, said):
    kind = {"num_labels": 1, "problem_type": "regression"} if labels == 1 else {"num_labels": labels}
    terms = RegularizerConfig(lambda_diversity=0.5, lambda_svd=0.5)
    BaLoraTrainer(
        model=classifier(**kind),
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=2 if labels == 1 else 1),
        train_dataset=samples(regression=labels == 1),
        peft_config=BaLoraConfig(r=2, lora_alpha=2, regularizers=terms),
    ).train()
    svd, diversity = (line for line in said() if "cannot act on a single" in line)
    assert f"{remedy} svd_input='features', or" in svd
    assert f"{remedy} diversity_input='features', or" in diversity
