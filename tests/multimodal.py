"""Tiny vision-language models of today's families, with batches of text and of images made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import VOCABULARY, character_tokenizer

VIDEO, START, IMAGE, END = range(VOCABULARY - 4, VOCABULARY)  # IMAGE: the placeholder of an image's features
LENGTH = 24
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**TEXT, "model_type": "llama"}
CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN3_MROPE = {**MROPE, "mrope_interleaved": True}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}
MISTRAL = {**TEXT, "model_type": "mistral"}
PIXTRAL = {**CLIP, "model_type": "pixtral", "head_dim": 8}

# family: (prefix of its classes, values of its config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {
            "text_config": {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
    ),
    "llava": (
        "Llava",
        {
            "text_config": LLAMA,
            "vision_config": {**CLIP, "model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
            "image_seq_length": 4,
        },
    ),
    "pixtral": (
        "Llava",
        {
            "text_config": MISTRAL,
            "vision_config": PIXTRAL,
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_seq_length": 4,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": MISTRAL,
            "vision_config": {**PIXTRAL, "image_size": 16},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            **QWEN_TOKENS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {**TEXT, "rope_parameters": QWEN3_MROPE},
            "vision_config": {**QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **QWEN_TOKENS,
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "text_config": {
                **TEXT,
                **LINEAR_ATTENTION,
                "rope_parameters": {**QWEN3_MROPE, "partial_rotary_factor": 1.0},
            },
            "vision_config": {**QWEN_VISION, "num_position_embeddings": 16},
            **QWEN_TOKENS,
        },
    ),
    "idefics3": (
        "Idefics3",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_id": IMAGE, "scale_factor": 1, "pad_token_id": 0},
    ),
    "smolvlm": (
        "SmolVLM",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_id": IMAGE, "scale_factor": 1, "pad_token_id": 0},
    ),
    "mllama": (
        "Mllama",
        {
            "text_config": {**TEXT, "cross_attention_layers": [1]},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
            },
            "image_token_index": IMAGE,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 16},
            "vision_config": {
                **CLIP,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "image_size": 16,
                "intermediate_size": 64,
                "pixel_shuffle_ratio": 0.5,
            },
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            "text_config": {
                **TEXT,
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window": 8,
                "global_head_dim": 8,
                "hidden_size_per_layer_input": 0,
                "num_kv_shared_layers": 0,
            },
            "vision_config": {
                **CLIP,
                "head_dim": 8,
                "num_key_value_heads": 2,
                "position_embedding_size": 16,
                "pooling_kernel_size": 2,
            },
            "audio_config": None,
            "image_token_id": IMAGE,
        },
    ),
}


def tiny_multimodal(name: str, seed: int = 1) -> Any:
    """A family's multimodal class, in training mode."""
    import transformers

    prefix, values = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**values)
    torch.manual_seed(seed)
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config)


def text_batch(seed: int = 3) -> dict[str, torch.Tensor]:
    """Two rows of text, the second one shorter; labels of the second half."""
    ids = torch.randint(3, VIDEO, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    labels = ids.clone()
    labels[:, :10] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def image_batch(name: str, seed: int = 3) -> dict[str, torch.Tensor]:
    """The same rows with an image of four features in each, and what the family's processor gives beside it."""
    batch = text_batch(seed)
    draw = torch.Generator().manual_seed(seed)
    span = slice(3, 7)
    if name != "mllama":  # which reads its image across, behind one placeholder
        batch["input_ids"][:, 2], batch["input_ids"][:, span], batch["input_ids"][:, 7] = START, IMAGE, END
    where = torch.zeros_like(batch["input_ids"])
    where[:, span] = 1
    square = torch.rand(2, 3, 8, 8, generator=draw)
    if name.startswith("qwen"):
        batch["pixel_values"] = torch.rand(2 * 16, 3 * 2 * 4 * 4, generator=draw)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        batch["mm_token_type_ids"] = where
    elif name == "gemma3":
        batch |= {"pixel_values": square, "token_type_ids": where}
    elif name == "gemma4":
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
        batch["pixel_values"] = torch.rand(2, 16, 3 * 4 * 4, generator=draw)
        batch["image_position_ids"] = grid.expand(2, 16, 2)
        batch["mm_token_type_ids"] = where
    elif name in ("idefics3", "smolvlm"):
        batch["pixel_values"] = square.unsqueeze(1)
        batch["pixel_attention_mask"] = torch.ones(2, 1, 8, 8, dtype=torch.long)
    elif name == "pixtral":
        batch |= {"pixel_values": square, "image_sizes": torch.tensor([[8, 8]] * 2)}
    elif name == "mistral3":
        batch["pixel_values"] = torch.rand(2, 3, 16, 16, generator=draw)
        batch["image_sizes"] = torch.tensor([[16, 16]] * 2)
    elif name == "llama4":
        batch["pixel_values"] = torch.rand(2, 3, 16, 16, generator=draw)
    elif name == "mllama":
        batch["input_ids"][:, 2] = 3
        batch["pixel_values"] = square.reshape(2, 1, 1, 3, 8, 8)
        batch["aspect_ratio_ids"] = torch.ones(2, 1, dtype=torch.long)
        batch["aspect_ratio_mask"] = torch.ones(2, 1, 1, dtype=torch.long)
        batch["cross_attention_mask"] = torch.ones(2, LENGTH, 1, 1, dtype=torch.long)
    else:
        batch["pixel_values"] = square
    return batch


def tiny_processor(name: str, start: str = "<start>") -> Any:
    """A family's own processor for images of 8 x 8 over the character tokenizer; needs PIL, no torchvision.

    `start` is the token in a text where its image goes (Gemma 3).
    """
    from transformers import PreTrainedTokenizerFast

    plain = character_tokenizer()
    values = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    named = {"boi_token": start, "image_token": "<image>", "eoi_token": "<end>"}  # START, IMAGE, END
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, **values, extra_special_tokens=named)
    if name == "gemma3":
        from transformers.models.gemma3 import Gemma3ImageProcessorPil, Gemma3Processor

        return Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 8, "width": 8}), tokenizer, image_seq_length=4)
    from transformers.models.clip import CLIPImageProcessorPil
    from transformers.models.llava import LlavaProcessor

    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def skip_where_broken(family):
    """Skips a family whose own forward fails in the transformers that is installed."""
    if family == "llama4" and transformers.__version__.startswith("5.24."):
        pytest.skip("transformers 5.24's Llama4ForConditionalGeneration reads image_outputs of an output without any")
