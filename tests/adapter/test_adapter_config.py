"""BaLoraConfig: what it refuses, and with which words."""

from __future__ import annotations

import logging

import pytest
from helpers import ba_lora
from models import tiny_llama

from balora_plugin import BaLoraConfig
from balora_plugin.adapter.config import _say_once
from balora_plugin.adapter.options import NEUTRAL_OPTIONS, OTHER_STARTS

pytestmark = pytest.mark.hosts


@pytest.mark.parametrize("key", list(NEUTRAL_OPTIONS))
def test_every_option_says_why_and_what_instead(key):
    neutral = NEUTRAL_OPTIONS[key]
    if key not in BaLoraConfig.__dataclass_fields__:
        pytest.skip(f"this release of PEFT has no {key}")
    config = BaLoraConfig(r=4)
    other = "all" if key == "bias" else True if neutral.value is False else {"anything": 1}
    setattr(config, key, other)  # PEFT checks some of them by itself, for what else they need
    with pytest.raises(ValueError) as caught:
        config._check_neutral()
    message = str(caught.value)
    assert f"{key}={other!r}" in message and neutral.reason in message and neutral.remedy in message
    assert "leave it at" not in message and len(neutral.reason) > 20 and neutral.remedy.split()[0] != neutral.reason
    setattr(config, key, neutral.value)
    config._check_neutral()


def test_refusals_name_what_stands_in_their_place():
    remedies = {
        "trainable_token_indices": "modules_to_save=['embed_tokens']",
        "ensure_weight_tying": "modules_to_save=['embed_tokens', 'lm_head']",
        "bias": "modules_to_save",
        "eva_config": "init_lora_weights='pissa'",
    }
    assert all(words in NEUTRAL_OPTIONS[key].remedy for key, words in remedies.items())


def test_the_remedy_for_new_tokens_trains_and_keeps_the_teacher(ids):
    model = ba_lora(tiny_llama(), modules_to_save=["embed_tokens", "lm_head"])
    assert model.get_input_embeddings().modules_to_save["default"].weight.requires_grad
    assert not model.get_input_embeddings().original_module.weight.requires_grad
    assert model(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("start", list(OTHER_STARTS))
def test_every_other_start_says_what_to_write(start):
    config = BaLoraConfig(r=4)
    config.init_lora_weights = start
    with pytest.raises(ValueError) as caught:
        config._check_neutral()
    assert f"init_lora_weights={start!r}" in str(caught.value) and OTHER_STARTS[start] in str(caught.value)
    assert "write" in str(caught.value)


def test_pissa_niter_means_pissa_fast_said_once(caplog):
    _say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        configs = [BaLoraConfig(r=4, init_lora_weights="pissa_niter_16") for _ in range(3)]
    assert all(str(config.init_lora_weights) == "pissa_fast" and config.delta for config in configs)
    assert [record.message.count("pissa_fast") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lambda_svd", r"lambda_svd is a setting of the terms: write regularizers=RegularizerConfig\(lambda_svd=...\)"),
        ("lora_alpa", "lora_alpa is not a setting of BaLoraConfig: did you mean lora_alpha?"),
    ],
)
def test_an_unknown_key_says_where_it_belongs(key, words):
    with pytest.raises(TypeError, match=words):
        BaLoraConfig(r=2, **{key: 0.5})
