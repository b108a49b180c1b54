"""What tells one teacher, or one tokenizer, from another: digests of weights, config and vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..distributed import gathered
from .classifier_head import head_names

# keys of a model's config that do not change its final hidden states in eval mode
_NEUTRAL_KEYS = {
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "quantization_config",  # the stored bytes say it
    "return_dict",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class TensorDigest(NamedTuple):
    """SHA-256 (hex) over one stored tensor: dtype, shape and bytes."""

    stored: str
    bfloat16: str  # of the same rounded to bfloat16; `stored` for integers, and where it was not asked for
    dtype: str


def model_fingerprint(model: nn.Module, *, with_adapters: bool = False) -> str:
    """Returns the SHA-256 (hex) over a model's stored weights, by name, and what of its config shapes hidden states.

    Adapters and the trained copies of `modules_to_save` are left out, so a wrapped model has its base's fingerprint;
    so is a classifier's head, which is new, and another one each time the model is loaded. `with_adapters=True` takes
    adapters in (a teacher that is itself adapted). Quantised weights count by their stored bytes. Every byte is read
    once, one tensor at a time through the CPU: about a second per 1 to 2 GB.

    Args:
        model: The causal language model, inside any PEFT wrapper.
        with_adapters: Whether its adapters are part of what it computes.

    Raises:
        ValueError: weights that are not loaded (meta device).
    """
    digests = weight_digests(model, with_adapters=with_adapters)
    return combine(getattr(model, "config", None), {name: digest.stored for name, digest in digests.items()})


def weight_digests(model: nn.Module, *, with_adapters: bool = False, bfloat16: bool = False) -> dict[str, TensorDigest]:
    """Returns the digest of every stored tensor by its name in the unwrapped model; see [`model_fingerprint`].

    `bfloat16`: also what a copy of the model in bfloat16 has, which tells the same weights in another dtype.
    """
    special = {
        name: "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    heads = head_names(model)
    seen: dict[tuple[Any, ...], TensorDigest] = {}
    digests = {}
    entries = model.state_dict(keep_vars=True).items()
    for key, value in tqdm(entries, desc="Hashing the weights", disable=None, delay=5, leave=False):
        name = key if with_adapters else _name_in_base(key, special)
        if name is not None and name.partition(".")[0] not in heads:
            digests[name] = _digest(name, value, seen, bfloat16)
    return digests


def combine(config: Any, digests: Mapping[str, str]) -> str:
    """Returns the SHA-256 (hex) over a model's config (None: left out) and the digests of its tensors by name."""
    relevant = None if config is None else _without_neutral(config.to_dict())
    digest = hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode())
    for name in sorted(digests):
        digest.update(f"{name}\0{digests[name]}\n".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """Returns the SHA-256 (hex) over a tokenizer's vocabulary, token to id; None for what has no vocabulary."""
    if not callable(getattr(tokenizer, "get_vocab", None)):
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _name_in_base(key: str, special: dict[str, str]) -> str | None:
    """Returns the name of a state-dict entry in the unwrapped model, or None for what PEFT has added."""
    parts = key.split(".")
    kept: list[str] = []
    inside = ""  # what the module that holds the next part keeps of the base
    for i, part in enumerate(parts):
        if inside and part != inside:
            return None
        if not inside:
            kept.append(part)
        inside = special.get(".".join(parts[: i + 1]), "")
    return ".".join(kept)


def _digest(name: str, value: Any, seen: dict[tuple[Any, ...], TensorDigest], bfloat16: bool) -> TensorDigest:
    if not isinstance(value, Tensor):
        return TensorDigest(repr(value), repr(value), "none")
    if value.device.type == "meta":
        raise ValueError(
            f"teacher_cache needs the teacher's weights to know them again, but {name} is not loaded on this process "
            "(meta device): switch cpu_ram_efficient_loading off, or remove teacher_cache."
        )
    # tied weights are read once; a gathered copy may lie where another one was
    sharded = hasattr(value, "ds_id") or hasattr(value, "full_tensor")
    known = None if sharded else (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
    if known is not None and value.numel() and known in seen:
        return seen[known]
    with gathered(value) as tensor:
        stored = tensor.detach().cpu().contiguous()
        exact = rounded = _sha256(stored)
        if bfloat16 and stored.dtype in (torch.float64, torch.float32, torch.float16):
            rounded = _sha256(stored.bfloat16())
    digest = TensorDigest(exact, rounded, str(stored.dtype).removeprefix("torch."))
    if known is not None:
        seen[known] = digest
    return digest


def _sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _without_neutral(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _without_neutral(entry)
            for key, entry in value.items()
            if key not in _NEUTRAL_KEYS and not str(key).endswith(("dropout", "_drop", "pdrop"))
        }
    return value
