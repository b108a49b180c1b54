"""The names that we use of a host's trainer: all public, all there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import Trainer, TrainerState, TrainingArguments

from balora_plugin.training import host
from balora_plugin.training.host import Accelerator, Arguments, HostTrainer, State

pytestmark = pytest.mark.hosts
TRAINING = Path(host.__file__).parent


def names(protocol):
    return {name for name in (*protocol.__annotations__, *vars(protocol)) if not name.startswith("_")}


def test_training_arguments_have_what_is_used():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert [name for name in names(Arguments) if name not in fields and not hasattr(TrainingArguments, name)] == []


def test_a_trainer_state_has_what_is_used():
    assert names(State) <= {field.name for field in dataclasses.fields(TrainerState)}


def test_a_trainer_has_what_is_used(tmp_path, llama):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Trainer(model=llama, args=arguments)
    assert [name for name in names(HostTrainer) if not hasattr(trainer, name)] == []
    assert [name for name in names(Accelerator) if not hasattr(trainer.accelerator, name)] == []
    assert callable(trainer._prepare_inputs)  # private, but hosts override it: training/set_up.py


@pytest.mark.parametrize("path", sorted(TRAINING.rglob("*.py")), ids=lambda path: path.stem)
def test_the_parts_of_a_run_read_nothing_private_of_its_trainer(path):
    """Only the mixin itself, and the one place that sets a run up, know more of a trainer than its public names."""
    text = path.read_text(encoding="utf-8")
    found = set(re.findall(r"(?:\bhost|_host|trainer)(?:\.accelerator)?\.(_\w+)", text))
    assert found <= {"set_up": {"_prepare_inputs"}, "fill_cache": {"_dataloaders"}}.get(path.stem, set())
