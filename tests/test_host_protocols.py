"""What we use of the hosts' objects is there, under the names we use, in the releases that are installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import Trainer, TrainerState, TrainingArguments

from balora_plugin.glue.data import SampleTable
from balora_plugin.glue.run import Predictor
from balora_plugin.glue.separation import Progress
from balora_plugin.pretrained.attention import RunArguments

pytestmark = pytest.mark.hosts


def test_training_arguments_and_state_have_what_is_read_of_them(tmp_path):
    assert isinstance(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), RunArguments)
    assert isinstance(TrainerState(), Progress)
    assert not isinstance(SimpleNamespace(device="cpu", bf16=True), RunArguments), "fp16 is missing"


def test_a_trainer_predicts_and_a_dataset_has_the_methods_that_are_called():
    assert issubclass(Trainer, Predictor)
    rows = Dataset.from_list([{"text": "a", "labels": 1}])
    assert isinstance(rows, SampleTable) and isinstance(rows.select([0]).remove_columns("labels"), SampleTable)
    assert not isinstance([], SampleTable)
