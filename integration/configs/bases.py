"""What the configs of the examples' base models say, written down: there is no hub where tests and pages are made.

Only what differs from the class's own values, or decides how many bytes and FLOP a step takes, stands here. The values
are the published ones from memory; `certain` is False where one may be another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PretrainedConfig

_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "model_type": "siglip_vision_model",
}


@dataclass(frozen=True)
class Base:
    """A base model: its type in transformers, the values of its config, and whether all of them are known for sure."""

    kind: str
    values: dict[str, Any]
    certain: bool = True


def _decoder(hidden: int, inner: int, layers: int, heads: tuple[int, int], vocabulary: int, **more: Any) -> dict[str, Any]:
    """The sizes of a decoder; `heads`: of queries, and of keys and values."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        **more,
    }


_LLAMA2_7B = Base("llama", _decoder(4096, 11008, 32, (32, 32), 32000))
_LLAMA3_8B = Base("llama", _decoder(4096, 14336, 32, (32, 8), 128256))
_LLAMA3_70B = Base("llama", _decoder(8192, 28672, 80, (64, 8), 128256))
BASES: dict[str, Base] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA2_7B,
    "meta-llama/Llama-2-13b-hf": Base("llama", _decoder(5120, 13824, 40, (40, 40), 32000)),
    "meta-llama/Meta-Llama-3-8B": _LLAMA3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3_8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA3_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA3_70B,
    "mistralai/Mistral-7B-v0.1": Base("mistral", _decoder(4096, 14336, 32, (32, 8), 32000)),
    "google/gemma-7b": Base(
        "gemma", _decoder(3072, 24576, 28, (16, 16), 256000, head_dim=256, tie_word_embeddings=True)
    ),
    "Qwen/Qwen1.5-7B": Base("qwen2", _decoder(4096, 11008, 32, (32, 32), 151936)),
    "01-ai/Yi-1.5-34B": Base("llama", _decoder(7168, 20480, 60, (56, 8), 64000)),
    "mistralai/Mixtral-8x7B-v0.1": Base(
        "mixtral", _decoder(4096, 14336, 32, (32, 8), 32000, num_local_experts=8, num_experts_per_tok=2)
    ),
    "outputs/deepseek-moe-16b-native": Base(  # the class that example_configs/paper/deepseek_moe_as_native.py writes
        "ernie4_5_moe",
        _decoder(
            2048,
            10944,
            28,
            (16, 16),
            102400,
            moe_intermediate_size=1408,
            moe_num_experts=64,
            moe_num_shared_experts=2,
            moe_k=6,
            tie_word_embeddings=False,
        ),
    ),
    "openai-community/gpt2-xl": Base("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "Qwen/Qwen2.5-0.5B": Base("qwen2", _decoder(896, 4864, 24, (14, 2), 151936, tie_word_embeddings=True)),
    "Qwen/Qwen3-8B-Base": Base("qwen3", _decoder(4096, 12288, 36, (32, 8), 151936, head_dim=128)),
    "Qwen/Qwen3-30B-A3B": Base(
        "qwen3_moe",
        _decoder(
            2048,
            6144,
            48,
            (32, 4),
            151936,
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
    "Qwen/Qwen3.5-9B": Base(
        "qwen3_5", {"text_config": _decoder(4096, 12288, 32, (16, 4), 248320, head_dim=256)}, certain=False
    ),
    "google/gemma-3-12b-pt": Base(
        "gemma3",
        {"text_config": _decoder(3840, 15360, 48, (16, 8), 262208, head_dim=256), "vision_config": _SIGLIP},
    ),
    "google/gemma-3-4b-it": Base(
        "gemma3", {"text_config": _decoder(2560, 10240, 34, (8, 4), 262208, head_dim=256), "vision_config": _SIGLIP}
    ),
    "google/gemma-4-E4B-it": Base(
        "gemma4",
        {
            "text_config": _decoder(2560, 10240, 42, (8, 2), 262144, num_kv_shared_layers=18),
            "vision_config": {},
            "audio_config": None,
        },
        certain=False,
    ),
    "mistralai/Mistral-Small-24B-Base-2501": Base(
        "mistral", _decoder(5120, 32768, 40, (32, 8), 131072, head_dim=128)
    ),
    "openai/gpt-oss-20b": Base(
        "gpt_oss",
        _decoder(2880, 2880, 24, (64, 8), 201088, head_dim=64, num_local_experts=32, num_experts_per_tok=4),
    ),
}


def config_of(cfg: Any) -> PretrainedConfig:
    """Returns the config of a YAML's base model, as `axolotl.loaders.utils.load_model_config` would.

    Raises:
        KeyError: the base model stands in no table here.
    """
    base = BASES[str(cfg["base_model"])]
    config = AutoConfig.for_model(base.kind, **base.values)
    if cfg.get("num_labels"):
        config.num_labels = cfg["num_labels"]
    for key, value in (cfg.get("overrides_of_model_config") or {}).items():
        setattr(config, key, value)
    if cfg.get("model_quantization_config"):
        config.quantization_config = {"quant_method": "mxfp4"}
    return config
