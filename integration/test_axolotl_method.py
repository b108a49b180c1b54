"""`method` and `terms`: baselines and ablations by one key, each the run that the spelled-out YAML gives."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("axolotl")
import torch
from peft import PeftModel
from peft.tuners.lora.variants import DoraLinearVariant
from transformers import AutoModelForCausalLM

from balora_plugin.hosts.axolotl.block import BaLoraBlock
from balora_plugin.hosts.axolotl.checks import findings_of
from balora_plugin.hosts.axolotl.method import spelled_out

from .axolotl_run import history, run

TERMS = {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02}
OFF = dict.fromkeys(TERMS, 0.0)
YAML = {"adapter": "ba_lora", "lora_r": 4, "lora_alpha": 4, "lora_target_linear": True}
DORA = {"adapter": "lora", "peft_use_dora": True}
BA = {"adapter": "ba_lora"}
# block: (the adapter's keys, the block) that it stands for
MEANT = {
    "ba_lora": ({"method": "ba_lora"}, BA, TERMS),
    "ba_lora, one": ({"method": "ba_lora", "terms": "svd"}, BA, {**OFF, "lambda_svd": 0.02}),
    "pissa": ({"method": "pissa"}, {**BA, "peft_init_lora_weights": "pissa"}, OFF),
    "lora": ({"method": "lora"}, {**BA, "peft_init_lora_weights": True}, OFF),
    "lora, all": ({"method": "lora", "terms": "all"}, {**BA, "peft_init_lora_weights": True}, TERMS),
    "dora": ({"method": "dora"}, DORA, {**OFF, "apply_to": "lora"}),
    "dora, all": ({"method": "dora", "terms": "all"}, DORA, {**TERMS, "apply_to": "lora"}),
    "terms alone": ({"terms": "diversity"}, BA, {**OFF, "lambda_diversity": 0.02}),
}


@pytest.mark.parametrize("name", MEANT)
def test_what_it_stands_for(name):
    asked, adapter, block = MEANT[name]
    found = spelled_out({**YAML, "ba_lora": {**TERMS, **asked}})
    assert found == {**YAML, **adapter, "ba_lora": block}
    assert list(findings_of(found, model=False)) == []
    assert spelled_out(found) is found


SERVING = {"drift_target": 0.1, "balance": {"svd": 0.1}, "teacher_cache": "here", "anchor_data": "some.txt"}


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        ({"method": "pissa"}, OFF),
        ({"method": "dora"}, {**OFF, "apply_to": "lora"}),
        ({"terms": "svd"}, {"balance": {"svd": 0.1}, "lambda_consistency": 0.0, "lambda_diversity": 0.0}),
        (
            {"terms": "consistency"},
            {key: SERVING[key] for key in SERVING if key != "balance"} | {"lambda_diversity": 0.0, "lambda_svd": 0.0},
        ),
    ],
)
def test_what_serves_a_term_goes_with_it(asked, left):
    found = spelled_out({**YAML, "ba_lora": {**SERVING, **asked}})["ba_lora"]
    assert found == left
    BaLoraBlock(**found)


def test_full_fine_tuning_has_no_adapters_keys():
    start = {"peft_init_lora_weights": "pissa_fast"}
    found = spelled_out({**YAML, **start, "learning_rate": 1e-5, "ba_lora": {**TERMS, "method": "full"}})
    assert found == {"learning_rate": 1e-5, "ba_lora": {**OFF, "apply_to": "full"}}


@pytest.mark.parametrize(
    ("changes", "block", "expected"),
    [
        ({}, {"method": "qlora"}, "ba_lora.method"),
        ({}, {"terms": "kl"}, "ba_lora.terms"),
        ({"adapter": "lora"}, {"method": "lora"}, "adapter: lora beside ba_lora.method: lora: write adapter: ba_lora"),
        ({}, {"method": "dora", "apply_to": "lora"}, "ba_lora.apply_to: lora beside method: dora: remove one"),
        ({}, {"method": "dora", "compile": True}, "ba_lora.compile: true beside method: dora.*: remove one of the two"),
        ({}, {"terms": "svd", "lambda_svd": 0}, "ba_lora.lambda_svd: 0 beside terms: svd leaves no term: remove one"),
        ({}, {"method": "full", "terms": "all"}, "has no teacher in full fine-tuning"),
    ],
)
def test_contradictions_are_one_line(changes, block, expected, written):
    with pytest.raises(ValueError, match=expected):
        run(written(**changes, ba_lora=block))


def test_the_one_key_trains_what_the_spelled_out_yaml_does(written):
    keys = ("loss", "grad_norm", "balora/consistency")
    short, long = (
        run(written(max_steps=2, **changes))
        for changes in (
            {"ba_lora": {**TERMS, "method": "lora", "terms": "consistency"}},
            {"ba_lora": {**TERMS, "lambda_diversity": 0, "lambda_svd": 0}, "peft_init_lora_weights": True},
        )
    )
    for key in keys:
        assert history(short, key) == history(long, key), key


def test_the_terms_on_a_dora(written, workspace, ids):
    """The teacher is the base, the saved adapter PEFT's own DoRA; NEFTune's noise and rsLoRA beside it."""
    trainer = run(
        written(ba_lora={**TERMS, "method": "dora", "terms": "all"}, peft_use_rslora=True, neftune_noise_alpha=5.0)
    )
    config = trainer.model.peft_config["default"]
    assert config.use_dora and config.use_rslora
    layer = next(m for m in trainer.model.modules() if hasattr(m, "lora_variant") and m.lora_variant)
    assert isinstance(layer.lora_variant["default"], DoraLinearVariant)
    assert history(trainer, "balora/consistency")[-1] > 1e-6
    base = AutoModelForCausalLM.from_pretrained(workspace / "base").eval()
    plain = PeftModel.from_pretrained(copy.deepcopy(base), trainer.args.output_dir).eval()
    with torch.no_grad():
        expected, before = trainer.model.eval()(ids).logits, base(ids).logits
        torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-5)
        with trainer.model.disable_adapter():
            assert torch.equal(trainer.model(ids).logits, before)
    assert (expected - before).abs().max() > 1e-4


def test_full_fine_tuning_by_one_key(written):
    trainer = run(written(ba_lora={"method": "full"}, max_steps=2))
    assert not hasattr(trainer.model, "peft_config")
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert history(trainer, "balora/task") and history(trainer, "loss")
