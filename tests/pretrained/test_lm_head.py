"""The LM head: read from the model, checked against it, its factor cached and renewed."""

from __future__ import annotations

import pytest
import torch
from models import VOCABULARY, tiny_gpt2, tiny_llama

from balora_plugin import RegularizerConfig
from balora_plugin.fused.factor import FactorCache
from balora_plugin.fused.head import Head
from balora_plugin.fused.project import project
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.lm_head import check_head, read_head
from balora_plugin.schedules import Lambdas

pytestmark = pytest.mark.hosts


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
        got = project(hidden, head)
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


def test_the_factor_stays_where_a_sharded_parameter_gives_new_views():
    """FSDP1: at every micro-batch another view of a flat parameter; its weight was factorised every time."""
    flat, cache = torch.nn.Parameter(torch.randn(5 + 20 * 4 + 20), requires_grad=False), FactorCache()

    def head():
        weight, bias = flat[5:85].view(20, 4), flat[85:]
        return Head(weight, bias, sources=(weight, bias))

    first = cache.get(head())
    assert cache.get(head()) is first
    with torch.no_grad():
        flat.mul_(2.0)
    assert cache.get(head()) is not first
    weight = flat[4:84].view(20, 4)
    other = cache.get(Head(weight, None, sources=(weight, None)))
    torch.testing.assert_close(other.plain @ other.plain.T, weight.double().T @ weight.double())


def test_the_factor_is_renewed_when_the_bias_changes():
    head, cache = Head(torch.randn(20, 4), torch.randn(20)), FactorCache()
    first = cache.get(head)
    head.bias.add_(1.0)
    assert cache.get(head) is not first


def test_the_factor_of_a_head_that_is_gone_is_not_another_heads():
    """An identity of freed memory comes back: by id() the second head would have got the first one's factor."""
    cache = FactorCache()
    for scale in range(1, 20):
        weight = torch.eye(4) * scale
        assert cache.get(Head(weight, None)).plain.square().sum().item() == pytest.approx(4 * scale**2)
        del weight


# --- a head whose parameters are not there when the trainer is built


def one_step(model, ids, **request):
    config = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.02, lambda_svd=0.02).resolved("nlg")
    return model(
        input_ids=ids,
        labels=ids,
        ba_lora=StepRequest(config=config, lambdas=Lambdas(0.5, 0.02, 0.02), **request),
    )


def halved(model):
    """`model` with a scale on its logits that its config does not tell of."""
    original = model.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    model.forward = forward
    return model


def partitioned(model):
    """As under ZeRO-3: parameters that say they are gathered later."""
    model.model.norm.weight.ds_id = 0
    return model


def test_what_could_not_be_checked_is_checked_in_the_first_forward_pass(ids):
    model = partitioned(halved(tiny_llama()))
    check_head(model)
    install(model)
    with pytest.raises(ValueError, match="logits are not"):
        one_step(model, ids)


def test_a_right_head_is_checked_once(ids):
    model = partitioned(tiny_llama())
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    check_head(model)
    assert not passes
    install(model)
    model.requires_grad_(False)
    one_step(model, ids)
    first = len(passes)
    one_step(model, ids)
    assert (first, len(passes)) == (4, 6)  # the check (twice), teacher, student; teacher, student


def test_a_model_on_the_meta_device_is_checked_when_it_is_there(ids):
    with torch.device("meta"):
        model = tiny_llama()
    check_head(model)
    model = model.to_empty(device="cpu")
    model.load_state_dict(tiny_llama().state_dict())
    model.model.rotary_emb = tiny_llama().model.rotary_emb  # its frequencies are in no state dict
    install(halved(model))
    with pytest.raises(ValueError, match="logits are not"):
        one_step(model, ids)


# --- a quantised head


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_head_is_dequantised(bits, ids, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from helpers import ba_lora
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    how = BitsAndBytesConfig(**{f"load_in_{bits}": True}, llm_int8_skip_modules=["nothing"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, device_map={"": "cpu"}).train()
    assert isinstance(base.lm_head, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
    check_head(base)
    model = ba_lora(base, targets=["q_proj"]).train()
    install(base)
    cache = FactorCache()
    packed = base.lm_head.weight
    out = one_step(model, ids, factors=cache)
    assert base.lm_head.weight is packed
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(out.task, expected, rtol=1e-4, atol=0)
    s = torch.linalg.svdvals(logits.double())
    assert out.svd.item() == pytest.approx(-(s[:10].sum() / s.sum()).item(), rel=1e-3)
    factor = cache._factor
    one_step(model, ids, factors=cache)
    assert cache._factor is factor
    out.loss.backward()


def test_a_head_that_cannot_be_read_is_refused_by_name():
    model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flatten())  # FSDP1, a unit of its own
    with pytest.raises(ValueError, match="transformer_layer_cls_to_wrap"):
        read_head(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="llm_int8_skip_modules"):
        read_head(model)
