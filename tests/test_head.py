"""The LM head: read from the model, checked against it, its factor cached and renewed."""

from __future__ import annotations

import pytest
import torch
from models import VOCABULARY, tiny_gpt2, tiny_llama

from balora_plugin.fused.project import project
from balora_plugin.head import FactorCache, check_head, read_head


def granite():
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            logits_scaling=4.0,
        )
    )


def cohere():
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(
        CohereConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            logit_scale=0.25,
        )
    )


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=0.5,
            initializer_range=0.5,
        )
    )


def phi_with_a_head_bias():
    from transformers import PhiConfig, PhiForCausalLM

    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
    )
    torch.nn.init.normal_(model.lm_head.bias)
    return model


MODELS = {
    "llama": (tiny_llama, {"scale": 1.0, "softcap": None}),
    "gpt2": (tiny_gpt2, {"scale": 1.0, "softcap": None}),
    "granite": (granite, {"scale": 0.25, "softcap": None}),
    "cohere": (cohere, {"scale": 0.25, "softcap": None}),
    "gemma2": (gemma2, {"scale": 1.0, "softcap": 0.5}),
    "phi": (phi_with_a_head_bias, {"scale": 1.0, "softcap": None}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_heads_logits_are_the_models(name, ids):
    build, expected = MODELS[name]
    model = build().eval()
    check_head(model)
    head = read_head(model)
    assert {"scale": head.scale, "softcap": head.softcap} == expected
    assert (head.bias is not None) == (name == "phi")
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        got = project(hidden, head.weight, head.bias, head.scale, head.softcap)
        torch.testing.assert_close(got, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    if name not in ("llama", "gpt2"):  # the naive reading would be another model's logits
        assert (hidden @ head.weight.T - got).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("build", "key", "value"),
    [(tiny_llama, "logit_scale", 0.5), (granite, "logits_scaling", 2.0), (gemma2, "final_logit_softcapping", 3.0)],
)
def test_a_wrong_reading_is_refused(build, key, value):
    model = build()
    if key == "logit_scale":
        model.config.logit_scale = value  # a scale the forward does not apply
    else:
        actual = getattr(model.config, key)
        original = type(model).forward

        def forward(*args, **kwargs):  # the forward keeps the value the model was built with
            setattr(model.config, key, actual)
            try:
                return original(model, *args, **kwargs)
            finally:
                setattr(model.config, key, value)

        model.forward = forward
        setattr(model.config, key, value)
    with pytest.raises(ValueError, match="logits are not"):
        check_head(model)


def test_a_head_copied_for_another_adapter_only():
    from helpers import ba_lora

    from balora_plugin import BaLoraConfig

    model = ba_lora(tiny_llama(), targets=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("two", BaLoraConfig(r=2, target_modules=["q_proj"]))
    base = model.get_base_model()
    assert read_head(base).weight is base.lm_head.modules_to_save["default"].weight
    assert read_head(base, teacher=True).weight is base.lm_head.original_module.weight
    model.set_adapter("two")
    assert read_head(base).weight is base.lm_head.original_module.weight


def test_the_factor_is_cached_and_renewed_when_the_head_changes():
    model, cache = tiny_llama(), FactorCache()
    first = cache.get(read_head(model))
    assert cache.get(read_head(model)) is first
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    second = cache.get(read_head(model))
    assert second is not first
    torch.testing.assert_close(second.plain.square().sum(), 4 * first.plain.square().sum())
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert cache.get(read_head(model)) is not second
