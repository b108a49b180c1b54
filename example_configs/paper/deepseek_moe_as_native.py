"""DeepSeek-MoE-16B as a class that transformers 5 has: the same function, other names.

    python example_configs/paper/deepseek_moe_as_native.py DOWNLOADED_CHECKPOINT outputs/deepseek-moe-16b-native

transformers 5 has no class for this first DeepSeek model (DeepSeek-V2's attention is another one), and the code in its
repository is written for transformers 4. Its layers are Ernie 4.5's mixture of experts, but for two things: Ernie turns
neighbouring pairs of a head's coordinates where DeepSeek turns a coordinate with the one half a head away (so rows of
q_proj and k_proj change places), and divides the chosen experts' weights by max(their sum, moe_norm_min) where DeepSeek
leaves them as they are (the sum is at most 1, so moe_norm_min = 1 divides by 1). Every other tensor is copied as it is.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# of its config: what this conversion can say in Ernie's words
EXPECTED = {
    "model_type": "deepseek",
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "attention_bias": False,
    "rope_scaling": None,
}
SAME = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


def as_ernie(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config in Ernie's words.

    Raises:
        ValueError: a value that the other class has no words for.
    """
    for key, value in EXPECTED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}: {config[key]!r} in config.json, expected {value!r}: not DeepSeek-MoE-16B.")
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        **{key: config[key] for key in SAME if key in config},
        "moe_num_experts": config["n_routed_experts"],
        "moe_num_shared_experts": config["n_shared_experts"],
        "moe_k": config["num_experts_per_tok"],
        "moe_layer_start_index": config["first_k_dense_replace"],
        "moe_norm_min": 1e-20 if config.get("norm_topk_prob") else 1.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)},
        "use_bias": False,
        "dtype": config.get("torch_dtype", "bfloat16"),
    }


def neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns a projection's rows so that coordinates i and i + half of each head stand beside each other."""
    half = weight.shape[0] // heads // 2
    return weight.view(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def convert(source: Path, target: Path) -> None:
    """Writes the checkpoint in `source` as Ernie's class into `target`, one file of weights at a time."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    changed = as_ernie(config)
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            module = name.split(".")[-2]
            if module in heads:
                tensors[name] = neighbours(tensor, heads[module])
        save_file(tensors, target / path.name, metadata={"format": "pt"})
    for path in [*source.glob("*.index.json"), *source.glob("token*.json"), *source.glob("generation_config.json")]:
        shutil.copy(path, target)
    (target / "config.json").write_text(json.dumps(changed, indent=2), encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
