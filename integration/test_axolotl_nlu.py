"""Classification from an Axolotl YAML: data, model, training, evaluation and saving by Axolotl's own code."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("axolotl")

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.merge_lora import do_cli as merge_lora
from axolotl.cli.train import do_train
from axolotl.integrations.base import PluginManager
from classifiers import batch, classifier
from models import character_tokenizer
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from balora_plugin.hosts.axolotl.trainer import AxolotlBaLoraTrainer

TERMS = {"task": "nlu", "preset": "iclr2026", "schedule": "constant", "svd_input": "features"}
ROWS = [
    {"sentence1": f"the number {i}", "sentence2": f"is it {'even' if i % 2 else 'odd'}?", "label": i % 3}
    for i in range(24)
]


@pytest.fixture(autouse=True)
def _one_thread(_seed):
    torch.set_num_threads(1)  # two would wait for each other more than they compute on models this small


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny pre-trained BERT without a classification head, and data of pairs."""
    path = tmp_path_factory.mktemp("axolotl-nlu")
    classifier("bert", num_labels=3, max_position_embeddings=128).bert.save_pretrained(path / "bert")
    character_tokenizer().save_pretrained(path / "bert")
    (path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


@pytest.fixture
def yaml(encoder, written):
    def write(**changes):
        values = {
            "base_model": str(encoder / "bert"),
            "model_type": "AutoModelForSequenceClassification",
            "num_labels": 3,
            "ba_lora": TERMS,
            "datasets": [{"path": str(encoder / "train.jsonl"), "ds_type": "json"}],
            "dataset_prepared_path": None,
            "sequence_len": 64,
            "micro_batch_size": 4,
            "val_set_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 3,
        }
        return written(**{**values, **changes})

    return write


def run(path, monkeypatch):
    """`axolotl train`: through the function its command calls, keeping the trainer."""
    from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin

    kept = []
    original = BaLoraPlugin.post_trainer_create
    monkeypatch.setattr(
        BaLoraPlugin, "post_trainer_create", lambda self, cfg, t: (original(self, cfg, t), kept.append(t))[0]
    )
    do_train(load_cfg(str(path)), TrainerCliArgs())
    return kept[-1]


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def test_a_classifier_from_a_yaml(encoder, yaml, monkeypatch):
    trainer = run(yaml(gradient_accumulation_steps=2), monkeypatch)
    assert isinstance(trainer, AxolotlBaLoraTrainer)
    assert trainer.ba_lora.task == "nlu" and trainer.ba_lora.svd_input == "features"
    consistency = history(trainer, "balora/consistency")
    assert consistency[0] == 0 < consistency[-1]
    assert all(math.isfinite(value) for value in history(trainer, "loss"))
    for key in ("eval_accuracy", "eval_macro_f1", "eval_balora/svd"):
        assert history(trainer, key), key
    assert not history(trainer, "ppl") and not history(trainer, "eval_ppl")
    sample = trainer.train_dataset[0]
    assert set(sample) == {"input_ids", "attention_mask", "labels"} | ({"token_type_ids"} & set(sample))
    assert len(trainer.train_dataset) == 16 and len(trainer.eval_dataset) == 8
    targets = {name.rpartition(".")[2] for name in trainer.model.peft_config["default"].target_modules}
    assert targets == {"query", "key", "value", "dense"}
    base = AutoModelForSequenceClassification.from_pretrained(encoder / "bert", num_labels=3)
    stock = PeftModel.from_pretrained(base, trainer.args.output_dir).eval()
    with torch.no_grad():
        ours = trainer.model.eval()(**batch()).logits
        torch.testing.assert_close(stock(**batch()).logits, ours, rtol=0, atol=1e-5)
    merge_lora(str(yaml()))
    merged = AutoModelForSequenceClassification.from_pretrained(f"{trainer.args.output_dir}/merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch()).logits, ours, rtol=0, atol=1e-4)
    # the new head is the same in each run of this seed
    again = run(yaml(gradient_accumulation_steps=2, max_steps=1, val_set_size=8), monkeypatch)
    assert history(again, "loss") == history(trainer, "loss")[:1]


def test_the_terms_on_a_plain_lora_and_columns_by_name(encoder, yaml, monkeypatch, tmp_path):
    data = tmp_path / "scores.jsonl"
    data.write_text("\n".join(json.dumps({"first": r["sentence1"], "score": r["label"] / 2}) for r in ROWS))
    trainer = run(
        yaml(
            adapter="lora",
            lora_target_linear=None,
            lora_target_modules=["query", "value"],
            num_labels=1,
            ba_lora={"apply_to": "lora", "text_columns": ["first"], "label_column": "score"},
            datasets=[{"path": str(data), "ds_type": "json"}],
            test_datasets=[{"path": str(data), "ds_type": "json", "split": "train"}],
            val_set_size=0,
        ),
        monkeypatch,
    )
    assert history(trainer, "eval_pearson") and history(trainer, "balora/consistency")[0] == 0
    assert len(trainer.eval_dataset) == 24


REFUSED = {
    "task": ({"model_type": None}, "ba_lora.task: nlu with model_type: None: write model_type: AutoModelForSeq"),
    "labels": ({"num_labels": None}, "num_labels: None must be the number of classes"),
    "nlg": ({"ba_lora": {"task": "nlg"}}, "which classifies: write nlu"),
    "packing": ({"sample_packing": True}, "sample_packing: true does not work with model_type"),
    "prompts": ({"datasets": [{"path": "x", "type": "alpaca"}]}, "datasets: type: alpaca of x is a prompt format"),
    "merging": ({"merge_method": "memory_efficient"}, "merge_method: memory_efficient would leave out"),
    "top": ({"label_column": "y"}, "write ba_lora.label_column"),
    "cache": ({"ba_lora": {"teacher_cache": "x"}}, "teacher_cache='x' with task='nlu'"),
    "deepspeed": (
        {"deepspeed": "zero2.json", "adapter": "lora", "ba_lora": {"apply_to": "lora"}},
        "deepspeed: zero2.json with adapter: lora does not work",
    ),
    "full": (
        {"adapter": None, "ba_lora": {"apply_to": "full", "teacher_cache": "x"}},
        "has no teacher in full fine-tuning, where no adapter can be switched off: write 0.",
    ),
    "compile": ({"ba_lora": {"compile": True}}, "ba_lora.compile: true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_loads(case, yaml):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        load_cfg(str(yaml(**changes)))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": "a", "label": 3}], "label 3 is not a whole number from 0 to 2, with num_labels=3"),
        ([{"sentence": "a", "label": -1}], "take the validation split"),
        ([{"words": "a", "label": 1}], "no text column is known by name"),
        ([{"sentence": "a", "class": 1}], "no label column is known by name"),
        ([{"sentence": 5, "label": 1}], "column 'sentence' holds something else than text"),
    ],
)
def test_data_that_is_none(rows, message, yaml, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    cfg = load_cfg(str(yaml(datasets=[{"path": str(path), "ds_type": "json"}])))
    with pytest.raises(ValueError) as caught:
        PluginManager.get_instance().load_datasets(cfg)
    assert message in str(caught.value)
