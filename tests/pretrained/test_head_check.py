"""The check of a head: architectures by their own classes, in every precision, at every size."""

from __future__ import annotations

import pytest
import torch
from models import VOCABULARY, tiny_llama

from balora_plugin import RegularizerConfig
from balora_plugin.objective.install import install
from balora_plugin.objective.request import StepRequest
from balora_plugin.pretrained.lm_head import check_head, read_head
from balora_plugin.schedules import Lambdas
from balora_plugin.training.checks.model import task_of

pytestmark = pytest.mark.hosts

COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LIKE_LLAMA = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
STATE_SPACE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
CLASSES = {
    "recurrent_gemma": (
        "RecurrentGemma",
        {**LIKE_LLAMA, "lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    ),
    "xlstm": ("xLSTM", {**COMMON, "num_heads": 4, "num_blocks": 2, "chunkwise_kernel": "chunkwise--native_autograd"}),
    "mamba": ("Mamba", STATE_SPACE),
    "mamba2": ("Mamba2", {**STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": ("FalconMamba", STATE_SPACE),
    "opt": ("OPT", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": 0, "dropout": 0.0}),
    "bart": (
        "Bart",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "dropout": 0.0,
        },
    ),
    "llama4_text": (
        "Llama4",
        {**LIKE_LLAMA, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8, "attention_chunk_size": 8},
    ),
    "mllama_text": ("Mllama", {**LIKE_LLAMA, "cross_attention_layers": [1]}),
}


def build(name, **changes):
    import transformers

    prefix, values = CLASSES[name]
    config_class = {"Llama4": "Llama4TextConfig", "Mllama": "MllamaTextConfig"}.get(prefix, f"{prefix}Config")
    torch.manual_seed(1)
    config = getattr(transformers, config_class)(**{**values, **changes})
    return getattr(transformers, f"{prefix}ForCausalLM")(config)


def random_head(hidden_size, vocab_size, std, dtype=torch.bfloat16):
    """A Llama without layers to speak of, its head drawn from N(0, std)."""
    model = tiny_llama(
        hidden_size=hidden_size, vocab_size=vocab_size, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2
    )
    torch.nn.init.normal_(model.lm_head.weight, std=std)
    return model.to(dtype)


def changed(model, change):
    """`model` with a forward that does something to its logits that its config does not tell of."""
    original = model.forward

    def forward(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLASSES)
def test_an_architectures_own_head_is_accepted(name, dtype):
    check_head(build(name).to(dtype))


@pytest.mark.parametrize("name", CLASSES)
def test_the_task_term_is_the_models_own_loss(name, ids):
    model = build(name)
    head = model.get_output_embeddings()
    if head.weight.shape[1] == 32:  # large logits, so that a cap says something
        head.weight.data.mul_(200.0)
    config = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.02, lambda_svd=0.02).resolved("nlg")
    check_head(model)
    install(model)
    mask = {} if "mamba" in name or name == "xlstm" else {"attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids, ba_lora=StepRequest(config=config, lambdas=Lambdas(0.5, 0, 0)), **mask)
        logits = model(input_ids=ids, use_cache=False, **mask).logits[:, :-1].flatten(0, 1).float()
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(out.task, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "key"), [("recurrent_gemma", "logits_soft_cap"), ("xlstm", "output_logit_soft_cap")])
def test_caps_are_read_by_each_models_own_name(name, key):
    assert read_head(build(name, **{key: 7.0})).softcap == 7.0


SIZES = [(16, 100), (64, 1000), (512, 5000), pytest.param(4096, 50_000, marks=[pytest.mark.slow, pytest.mark.long])]


@pytest.mark.parametrize("std", [0.002, 0.02, 0.5])
@pytest.mark.parametrize(("hidden_size", "vocab_size"), SIZES)
def test_random_heads_come_out_right_in_bfloat16(hidden_size, vocab_size, std):
    model = random_head(hidden_size, vocab_size, std)
    check_head(model)
    check_head(changed(model, lambda logits: logits.float()))


CHANGES = {
    "a cap of 30": lambda logits: 30.0 * torch.tanh(logits / 30.0),
    "a cap of 100": lambda logits: 100.0 * torch.tanh(logits / 100.0),
    "a scale of 1.02": lambda logits: logits * 1.02,
    "a scale of 0.5": lambda logits: logits * 0.5,
    "a scale from position 40 on": lambda logits: torch.cat([logits[:, :40], logits[:, 40:] * 0.5], dim=1),
    "a cap of 30, float": lambda logits: (30.0 * torch.tanh(logits / 30.0)).float(),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("hidden_size", "vocab_size"), SIZES[:3])
def test_what_the_config_does_not_tell_of_is_refused_at_every_precision(hidden_size, vocab_size, dtype, what):
    model = random_head(hidden_size, vocab_size, 0.02, dtype)
    check_head(model)
    with pytest.raises(ValueError, match="logits are not"):
        check_head(changed(model, CHANGES[what]))


def test_an_amplified_pass_leaves_nothing_behind(ids):
    model = random_head(32, VOCABULARY, 0.02, torch.float32).eval()
    before = model(input_ids=ids).logits
    check_head(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not model.model._forward_hooks


@pytest.mark.parametrize("prefix", ["Bert", "Roberta", "ModernBert"])
def test_a_masked_language_model_is_refused_by_name(prefix):
    import transformers

    config = getattr(transformers, f"{prefix}Config")(**COMMON, intermediate_size=48, pad_token_id=0)
    model = getattr(transformers, f"{prefix}ForMaskedLM")(config)
    with pytest.raises(ValueError, match=rf"{prefix}ForMaskedLM is a masked language model.*AutoModelForCausalLM"):
        task_of(model, RegularizerConfig())


def test_a_model_without_logits_is_named_in_one_line():
    from transformers import BertConfig, BertForPreTraining

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"^BertForPreTraining gives no logits .* needs a causal LM"):
        check_head(BertForPreTraining(BertConfig(**sizes, num_attention_heads=4)))
