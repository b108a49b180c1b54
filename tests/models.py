"""Tiny models and a tokenizer, built on the spot: no download, no GPU."""

from __future__ import annotations

import torch

VOCABULARY = 96


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


FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
QUANTISED = {
    "nf4": {**FOUR_BIT, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {**FOUR_BIT, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {**FOUR_BIT, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def load_quantised(path, kind, device="cpu", **changes):
    """A saved model through bitsandbytes, in training mode: in eval mode it is another function on a CPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**{**QUANTISED[kind], **changes})
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32, device_map={"": device}
    ).train()


def character_tokenizer():
    """One token a printable ASCII character, with a chat template that marks the assistant's tokens."""
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
