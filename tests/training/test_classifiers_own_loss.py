"""A classifier whose loss is not the one that is trained is named, one whose loss it is is not."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import TERMS
from models import tiny_llama
from test_acting import arguments
from torch.nn import functional as F
from transformers import LlamaForSequenceClassification

from balora_plugin import BaLoraConfig, BaLoraTrainer

pytestmark = pytest.mark.hosts


def weighted(labels, pooled_logits, config, **kwargs):
    return F.cross_entropy(pooled_logits, labels, weight=torch.tensor([1.0, 9.0, 3.0]))


def smoothed(labels, pooled_logits, config, **kwargs):
    return F.cross_entropy(pooled_logits, labels, label_smoothing=0.3)


class Weighs(LlamaForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        out.loss = None if labels is None else F.cross_entropy(out.logits * 0.25, labels)
        return out


OWN = {
    "class weights": (LlamaForSequenceClassification, weighted),
    "smoothing": (LlamaForSequenceClassification, smoothed),
    "in its forward": (Weighs, None),
}
PLAIN = {
    "classes": {"num_labels": 3},
    "numbers": {"num_labels": 1},
    "several numbers": {"num_labels": 2, "problem_type": "regression"},
    "several labels": {"num_labels": 3, "problem_type": "multi_label_classification"},
}


def said(tmp_path, caplog, cls, loss=None, **sizes):
    logging.getLogger("transformers").propagate = True
    torch.manual_seed(0)
    values = {**tiny_llama().config.to_dict(), "initializer_range": 0.5, "num_labels": 3, **sizes}
    model = cls(type(tiny_llama().config)(**values))
    before = model.config.problem_type
    if loss is not None:
        model.loss_function = loss
    config = BaLoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], regularizers=TERMS)
    BaLoraTrainer(model=model, args=arguments(tmp_path), train_dataset=[], peft_config=config)
    assert model.config.problem_type == before
    return [r.getMessage() for r in caplog.records if "a loss of its own" in r.getMessage()]


@pytest.mark.parametrize("case", OWN)
def test_a_loss_of_its_own_is_said(case, tmp_path, caplog):
    (line,) = said(tmp_path, caplog, *OWN[case])
    assert OWN[case][0].__name__ in line and "weigh_ba_lora_task" in line and "the labels' cross-entropy is" in line


@pytest.mark.parametrize("case", PLAIN)
def test_what_transformers_takes_is_what_is_trained(case, tmp_path, caplog):
    assert not said(tmp_path, caplog, LlamaForSequenceClassification, **PLAIN[case])
