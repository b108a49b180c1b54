"""LLaMA-Factory's keys: refused, superseded, mapped. docs/llamafactory.md has this as a table, which a test holds.

What is in none of them is passed to LLaMA-Factory as it is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class RefusedKey(NamedTuple):
    """A key of LLaMA-Factory that BA-LoRA does not train with.

    Attributes:
        allowed: Its values that are no reason, beside its absence.
        why: A phrase behind key and value.
        remedy: What to write.
        changes_training: Whether that trains something else.
    """

    allowed: tuple[Any, ...]
    why: str
    remedy: str
    changes_training: bool | None = True


_OFF: tuple[Any, ...] = (False, None)
_LOSS = RefusedKey(_OFF, "is a loss of its own in the place of the one that has the terms", "remove it")
_OPTIMIZER = RefusedKey(_OFF, "is for full fine-tuning, as LLaMA-Factory says too", "remove it")
_ENGINE = RefusedKey(_OFF, "trains by another engine, without the adapter and the terms", "remove it", False)

REFUSED_KEYS: dict[str, RefusedKey] = {
    "stage": RefusedKey(("sft", None), "is not supervised fine-tuning, the one with the terms", "write stage: sft"),
    "finetuning_type": RefusedKey(("lora", None), "has no LoRA to put A0 and B0 beside", "write finetuning_type: lora"),
    "use_unsloth": RefusedKey(
        _OFF,
        "has kernels that read lora_A and lora_B past the adapter: nothing would train",
        "remove it",
        False,
    ),
    "use_dora": RefusedKey(_OFF, "rescales the adapted weight, which the delta form has no place for", "remove it"),
    "enable_liger_kernel": RefusedKey(
        _OFF, "puts Liger's fused loss in the place of the forward that has the terms", "remove it", False
    ),
    "use_dft_loss": _LOSS,
    "use_eaft_loss": _LOSS,
    "use_asft_loss": _LOSS,
    "use_llama_pro": RefusedKey(_OFF, "trains new blocks, without which the teacher is not the model", "remove it"),
    "mixture_of_depths": RefusedKey((None,), "is another model than the pre-trained one, the teacher", "remove it"),
    "shift_attn": RefusedKey(_OFF, "is another attention in training than the pre-trained model's", "remove it"),
    "train_from_scratch": RefusedKey(_OFF, "leaves no pre-trained model to be the teacher", "remove it"),
    "resize_vocab": RefusedKey(_OFF, "changes embeddings and head, which the teacher shares", "remove it"),
    "add_tokens": RefusedKey((None,), "resizes the embeddings, which the teacher shares", "use tokens that are there"),
    "add_special_tokens": RefusedKey(
        (None,), "resizes the embeddings, which the teacher shares", "use tokens that are there"
    ),
    "new_special_tokens_config": RefusedKey(
        (None,), "resizes the embeddings, which the teacher shares", "use tokens that are there"
    ),
    "fp8": RefusedKey(_OFF, "replaces the linear layers under the adapter", "write bf16: true"),
    "use_v1_kernels": RefusedKey(_OFF, "replaces forwards behind the adapter's back", "remove it", False),
    "use_kt": _ENGINE,
    "use_mca": _ENGINE,
    "use_hyper_parallel": _ENGINE,
    "use_galore": _OPTIMIZER,
    "use_apollo": _OPTIMIZER,
    "use_badam": _OPTIMIZER,
}

# switched off; what takes their place
SUPERSEDED_KEYS: dict[str, str] = {
    "pissa_convert": "every save is already a plain LoRA for the original base",
    "upcast_lmhead_output": "the terms are computed in float32 from the head's weight",
}

# become the start of the adapter
MAPPED_KEYS = ("pissa_init", "pissa_iter")

# of the environment: LLaMA-Factory takes another way by them
REFUSED_VARIABLES: dict[str, tuple[str, str]] = {
    "USE_V1": ("starts LLaMA-Factory's v1, which is left alone", "unset it"),
    "USE_MCA": ("trains by Megatron, which knows neither the adapter nor the terms", "unset it"),
    "USE_KT": ("trains by KTransformers, which knows neither the adapter nor the terms", "unset it"),
    "USE_RAY": ("starts workers that import LLaMA-Factory anew, without the terms", "use FORCE_TORCHRUN=1"),
}
