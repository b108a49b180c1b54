"""Tiny models and a tokenizer, built on the spot: no download, no GPU."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TRACKIO_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

VOCABULARY = 96


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


def tiny_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes}))


def tiny_gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    values = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1}
    torch.manual_seed(1)
    return GPT2LMHeadModel(GPT2Config(**{**values, **ends, **changes}))


def tiny_mixtral(**changes):
    from transformers import MixtralConfig, MixtralForCausalLM

    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    torch.manual_seed(1)
    return MixtralForCausalLM(MixtralConfig(**{**values, **changes}))


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer without merges: any text, a vocabulary of VOCABULARY at most matters not (ids are clipped
    by the texts we use: printable ASCII)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(i) for i in range(ord(" "), ord("~") + 1)]
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for character in characters:
        if len(vocabulary) < VOCABULARY and character not in "`{|}~":
            vocabulary[character] = len(vocabulary)
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] + eos_token }}"
        "{% endgeneration %}{% else %}U: {{ m['content'] }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    return fast


@pytest.fixture
def llama():
    return tiny_llama()


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
