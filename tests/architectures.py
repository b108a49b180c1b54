"""Tiny models of today: mixtures of experts that all-linear adapts in part, hybrids with Mamba layers."""

from __future__ import annotations

import torch
from models import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}
FUSED = ["experts.down_proj", "experts.gate_up_proj"]
# model type: (its own settings, what of it "all-linear" leaves out and target_parameters takes in)
LEFT_OUT = {
    "gpt_oss": ({}, ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.router.weight"]),
    "granitemoe": ({}, [*(f"block_sparse_moe.{name}" for name in FUSED), "block_sparse_moe.router.weight"]),
    "qwen2_moe": ({}, [*(f"mlp.{name}" for name in FUSED), "mlp.gate.weight"]),
    "qwen3_5_moe_text": (LINEAR_ATTENTION, [*(f"mlp.{name}" for name in FUSED), "mlp.gate.weight"]),
    "gemma4_text": (
        {
            "enable_moe_block": True,
            "top_k_experts": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 8,
            "hidden_size_per_layer_input": 0,
        },
        FUSED,
    ),
    "phimoe": ({}, [*(f"mlp.{name}" for name in FUSED), "mlp.router.weight"]),
    "jamba": (JAMBA, [f"feed_forward.{name}" for name in FUSED]),
    "lfm2_moe": (
        {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
        [*(f"feed_forward.{name}" for name in FUSED), "feed_forward.gate.weight"],
    ),
    "llama4_text": (
        {"intermediate_size_mlp": 48},
        [*(f"feed_forward.{name}" for name in FUSED), "feed_forward.router.weight"],
    ),
}


FALCON_H1 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8}


def tiny(model_type, **changes):
    """A causal language model of this type, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes})).eval()
