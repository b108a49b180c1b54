"""Several adapters, one of another name, and copies of a model that are made in a run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import TERMS
from models import tiny_llama
from test_acting import arguments, tokens
from transformers import TrainerCallback

from balora_plugin import BaLoraConfig, BaLoraTrainer, get_ba_lora_model

pytestmark = pytest.mark.hosts


def adapter(target):
    return BaLoraConfig(r=2, lora_alpha=2, target_modules=[target], regularizers=TERMS)


def trainer(directory, *, active=("default", "second"), callbacks=(), **changes):
    """Of a model with `default` and `second`, or one adapter of another name."""
    first = "default" if "second" in active or "default" in active else active[0]
    model = get_ba_lora_model(tiny_llama(), adapter("q_proj"), adapter_name=first)
    if first == "default":
        model.add_adapter("second", adapter("v_proj"))
    model.base_model.set_adapter(list(active))
    changes = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01, **changes}
    return BaLoraTrainer(
        model=model,
        args=arguments(directory, **changes),
        train_dataset=tokens(),
        eval_dataset=tokens(),
        callbacks=list(callbacks),
    )


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


KINDS = [("default", "second"), ("default",), ("second",), ("mine",)]


@pytest.mark.parametrize("active", KINDS, ids="+".join)
def test_adapters_resume_as_the_uninterrupted_run(active, tmp_path):
    whole = trainer(tmp_path / "whole", active=active)
    whole.train()
    expected = trained(whole.model)
    assert {name.split(".")[-2] for name in expected} == {*active}
    resumed = trainer(tmp_path / "resumed", active=active)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-1"))
    found = trained(resumed.model)
    assert found.keys() == expected.keys() and resumed.model.active_adapters == list(active)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("active", KINDS, ids="+".join)
def test_of_the_best_checkpoint_every_adapter_is_loaded(active, tmp_path):
    seen = {}

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = trained(model)

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    best |= {"metric_for_best_model": "loss", "max_steps": 2}
    made = trainer(tmp_path, active=active, callbacks=[Weights()], **best)
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-1")  # the higher loss
    found = trained(made.model)
    assert found.keys() == seen[1].keys() and all(torch.equal(found[name], value) for name, value in seen[1].items())


def test_copies_that_are_made_in_a_run_stand_on_their_own(tmp_path):
    """A deep copy and a pickled copy of the model compute with their own weights."""
    ids = torch.arange(1, 5)[None]
    seen = []
    ways = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
    try:
        pickle.dumps(tiny_llama())
    except AttributeError:  # transformers 5.16 beside the package kernels: functions made in a function
        del ways[1]

    class Copies(TrainerCallback):
        @torch.no_grad()
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            expected = model(input_ids=ids).logits
            for way in ways:
                made = way(model)
                same = torch.equal(made(input_ids=ids).logits, expected)
                for parameter in made.parameters():
                    parameter.mul_(2)
                moved = not torch.equal(made(input_ids=ids).logits, expected)
                seen.append((type(made) is type(model), same, moved))
            assert torch.equal(model(input_ids=ids).logits, expected)
            model.train()

    first = trainer(tmp_path, active=("mine",), callbacks=[Copies()], max_steps=1, save_strategy="no")
    first.train()
    assert seen == [(True, True, True)] * len(ways)
