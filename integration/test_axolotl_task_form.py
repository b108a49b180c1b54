"""label_smoothing_factor and ba_lora.loss_type in an Axolotl YAML: they reach the loss, or are refused by name."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("axolotl")
from axolotl.cli.config import load_cfg

from balora_plugin import regularizers
from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin
from balora_plugin.hosts.axolotl.trainer import AxolotlBaLoraTrainer, trainer_class

from .axolotl_run import history, run

FORMS = [
    ({"label_smoothing_factor": 0.2}, {"label_smoothing": 0.2}),
    ({"ba_lora": {"loss_type": "dft"}}, {"dft": True}),
]


@pytest.mark.parametrize(("changes", "form"), FORMS)
def test_it_is_the_loss_that_is_trained(changes, form, written):
    """The first step's task term against the logits of the model that it began with."""
    trainer = run(written(max_steps=1, **changes))
    assert isinstance(trainer, AxolotlBaLoraTrainer)
    model = trainer.model.eval()
    sums, count = 0.0, 0
    with model.disable_adapter():  # step 0 is the base model
        for rows in trainer.get_train_dataloader():
            rows = {key: value for key, value in rows.items() if key in ("input_ids", "attention_mask", "labels")}
            labels = rows.pop("labels")[:, 1:].flatten()
            z = model(**rows).logits[:, :-1].flatten(0, 1)
            sums += regularizers.cross_entropy_rows(z, labels, **form).sum().item()
            count += int((labels != -100).sum())
            break
    assert history(trainer, "balora/task") == pytest.approx([sums / count], rel=1e-3)
    assert history(trainer, "loss")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_smoothing_factor": 1.5}, "label_smoothing_factor=1.5"),
        ({"loss_type": "dft"}, "loss_type: 'dft' stands at top level, where it is ignored: write ba_lora.loss_type"),
        ({"ba_lora": {"loss_type": "focal"}}, "focal"),
        ({"ba_lora": {"loss_type": "dft"}, "label_smoothing_factor": 0.1}, "does not go together with loss_type='dft'"),
    ],
)
def test_what_it_cannot_be_is_refused_by_name(changes, words, written):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_cfg(str(written(**changes)))


def test_without_the_terms_axolotls_arguments_are_its_own(written):
    plugin = BaLoraPlugin()
    cfg = load_cfg(str(written(adapter="lora", ba_lora=None, label_smoothing_factor=0.2)))
    assert plugin.get_training_args(cfg) is None and plugin.get_trainer_cls(cfg) is None
    cfg = load_cfg(str(written()))
    assert plugin.get_training_args(cfg) is None and plugin.get_trainer_cls(cfg) is trainer_class(None)
