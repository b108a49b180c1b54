"""Tiny configurations of the architectures that people fine-tune, by transformers' model type.

Each is the real class with small numbers, set only where the class has them. What makes a family peculiar stays: tied
embeddings, softcaps, logit scales, biases, sliding windows, shared experts, recurrent layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

VOCABULARY = 96
CAUSAL_LM, CLASSIFIER = "CAUSAL_LM", "SEQ_CLS"
_LABELS = 3

# key of a config -> its small value; the classes differ in which of them they have
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    "vocab_size": VOCABULARY,
    "head_dim": 8,
    "initializer_range": 0.1,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    # attention with latent keys and values
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    # recurrent and linear-attention layers
    **dict.fromkeys(("mamba_d_state", "state_size", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_d_conv", "conv_kernel", "linear_conv_kernel_dim", "mamba_expand"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_dt_rank", "num_heads", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "mamba_d_head": 16,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # a base's own dropout is another noise than the adapter's; it is said at the first step, and tested elsewhere
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout", "activation_dropout", "layerdrop"), 0.0),
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "seq_classif_dropout"), 0.0),
    **dict.fromkeys(
        ("pooler_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout", "classifier_dropout_prob"), 0.0
    ),
    **dict.fromkeys(("residual_dropout", "router_jitter_noise", "input_jitter_noise"), 0.0),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"num_key_value_heads": 4, "n_shared_experts": 1}
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_PER_LAYER = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
}
_ALSO: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "distilbert": {"dim": 32, "hidden_dim": 48},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        **_PER_LAYER,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 4,
    },
    "gemma4_text": {**_PER_LAYER, "global_head_dim": 8},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "expand": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 24,
    },
    "qwen3_5_text": _LINEAR_THEN_FULL,
    "qwen3_5_moe_text": _LINEAR_THEN_FULL,
    "qwen3_next": _LINEAR_THEN_FULL,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "num_mem_blocks": 1,
        "kv_channels": 8,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
    },
}

# fmt: off
LANGUAGE_MODELS = [
    "apertus", "arcee", "bamba", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "helium",
    "hunyuan_v1_dense", "jamba", "lfm2", "lfm2_moe", "llama", "llama4_text", "mamba", "mamba2", "minimax",
    "ministral", "ministral3", "mistral", "mixtral", "mpt", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3",
    "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_text",
    "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "recurrent_gemma", "rwkv", "seed_oss", "smollm3", "stablelm",
    "starcoder2", "vaultgemma", "xglm", "zamba2",
]
CLASSIFIERS = [
    "bert", "roberta", "deberta-v2", "modernbert", "electra", "distilbert", "albert", "xlm-roberta", "mpnet",
    "eurobert", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_neo", "gpt_neox", "gpt_oss", "llama", "ministral",
    "mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_5_text",
    "smollm3", "stablelm", "starcoder2",
]
# fmt: on
# the models of the paper's tables -> the family that is their class in transformers
PAPER = {
    "LLaMA-2-7B, LLaMA-2-13B, LLaMA-3-8B, LLaMA-3-70B, Yi-1.5-34B": "llama",
    "Mistral-7B-v0.1": "mistral",
    "Gemma-7B": "gemma",
    "Qwen1.5-7B": "qwen2",
    "DeepSeek-MoE-16B (as example_configs/paper/deepseek_moe_as_native.py writes it)": "ernie4_5_moe",
    "Mixtral-8x7B-v0.1": "mixtral",
    "GPT-2-XL": "gpt2",
    "BERT-large": "bert",
    "RoBERTa-large": "roberta",
    "DeBERTa-v3-base": "deberta-v2",
}


def tiny(family: str, task: str = CAUSAL_LM, seed: int = 0, *, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """Returns a tiny model of this family in float32, its weights random by `seed`."""
    known = AutoConfig.for_model(family).to_dict()
    values = {key: value for key, value in _SMALL.items() if key in known} | _ALSO.get(family, {})
    values |= {key: vocabulary for key in ("vocab_size", "vocab_size_per_layer_input") if key in values}
    if task == CLASSIFIER:
        values["num_labels"] = _LABELS
    config = AutoConfig.for_model(family, **values)
    auto = AutoModelForSequenceClassification if task == CLASSIFIER else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):  # a run's order of rows comes from the global state
        torch.manual_seed(seed)
        return auto.from_config(config, dtype=torch.float32)
