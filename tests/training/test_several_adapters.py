"""Two adapters that train together, and copies of a model that are made in a run."""

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


def trainer(directory, *, both=True, callbacks=(), **changes):
    model = get_ba_lora_model(tiny_llama(), adapter("q_proj"))
    if both:
        model.add_adapter("second", adapter("v_proj"))
        model.base_model.set_adapter(["default", "second"])
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


def test_two_adapters_that_train_together_resume_as_the_uninterrupted_run(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    expected = trained(whole.model)
    assert {name.split(".")[-2] for name in expected} >= {"default", "second"}
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-1"))
    found = trained(resumed.model)
    assert found.keys() == expected.keys() and resumed.model.active_adapters == ["default", "second"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_best_of_two_adapters_is_loaded_whole(tmp_path):
    seen = {}

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = trained(model)

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    made = trainer(tmp_path, callbacks=[Weights()], metric_for_best_model="loss", max_steps=2, **best)
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-1")  # the higher loss
    found = trained(made.model)
    assert found.keys() == seen[1].keys() and all(torch.equal(found[name], value) for name, value in seen[1].items())


def test_copies_that_are_made_in_a_run_stand_on_their_own(tmp_path):
    """A deep copy and a pickled copy of the model compute with their own weights."""
    ids = torch.arange(1, 5)[None]
    ways = [copy.deepcopy]
    try:
        pickle.dumps(tiny_llama())
    except AttributeError:  # classes that the package kernels makes inside a function: no model pickles beside it
        pass
    else:
        ways.append(lambda model: pickle.loads(pickle.dumps(model)))
    seen = []

    class Copies(TrainerCallback):
        @torch.no_grad()
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            expected = model(input_ids=ids).logits
            for made in [way(model) for way in ways]:
                same = torch.equal(made(input_ids=ids).logits, expected)
                for parameter in made.parameters():
                    parameter.mul_(2)
                moved = not torch.equal(made(input_ids=ids).logits, expected)
                seen.append((type(made) is type(model), same, moved))
            assert torch.equal(model(input_ids=ids).logits, expected)
            model.train()

    first = trainer(tmp_path, both=False, callbacks=[Copies()], max_steps=1, save_strategy="no")
    first.train()
    assert seen == [(True, True, True)] * len(ways)
