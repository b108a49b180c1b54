"""What tells one teacher, or one tokenizer, from another: digests of weights, config and vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

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


def model_fingerprint(model: nn.Module, *, with_adapters: bool = False) -> str:
    """SHA-256 (hex) over a model's stored weights, by name, and the part of its config that shapes hidden states.

    Adapters and the trained copies of `modules_to_save` are left out, so a wrapped model has its base's fingerprint;
    `with_adapters=True` takes them in (a teacher that is itself adapted). Quantised weights count by their stored
    bytes. Every byte is read once, one tensor at a time through the CPU: about a second per 1 to 2 GB.

    Args:
        model: The causal language model, inside any PEFT wrapper.
        with_adapters: Whether its adapters are part of what it computes.

    Raises:
        ValueError: weights that are not loaded (meta device).
    """
    special = {
        name: "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
        for name, module in model.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    }
    seen: dict[tuple[Any, ...], str] = {}
    digest = hashlib.sha256(json.dumps(_relevant(model), sort_keys=True, default=str).encode())
    entries = {}
    for key, value in model.state_dict(keep_vars=True).items():
        name = key if with_adapters else _name_in_base(key, special)
        if name is not None:
            entries[name] = _digest(name, value, seen)
    for name in sorted(entries):
        digest.update(f"{name}\0{entries[name]}\n".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """SHA-256 (hex) over a tokenizer's vocabulary, token to id; None for what has no vocabulary."""
    if not callable(getattr(tokenizer, "get_vocab", None)):
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _name_in_base(key: str, special: dict[str, str]) -> str | None:
    """The name of a state-dict entry in the unwrapped model, or None for what PEFT has added."""
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


def _digest(name: str, value: Any, seen: dict[tuple[Any, ...], str]) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.device.type == "meta":
        raise ValueError(
            f"teacher_cache needs the teacher's weights to know them again, but {name} is not loaded on this process "
            "(meta device): switch cpu_ram_efficient_loading off, or remove teacher_cache."
        )
    # tied weights are read once; a gathered copy may lie where another one was
    gathered = hasattr(value, "ds_id") or hasattr(value, "full_tensor")
    known = None if gathered else (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
    if known is not None and value.numel() and known in seen:
        return seen[known]
    with _whole(value) as tensor:
        stored = tensor.detach().cpu().contiguous().reshape(-1)
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(stored.view(torch.uint8).numpy().data)
    if known is not None:
        seen[known] = digest.hexdigest()
    return digest.hexdigest()


@contextmanager
def _whole(tensor: Tensor) -> Iterator[Tensor]:
    """A parameter that is sharded over processes, gathered."""
    if hasattr(tensor, "ds_id"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([tensor]):
            yield tensor.data
    elif hasattr(tensor, "full_tensor"):
        yield tensor.full_tensor()
    else:
        yield tensor


def _relevant(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return _without_neutral(config.to_dict()) if config is not None else None


def _without_neutral(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _without_neutral(entry)
            for key, entry in value.items()
            if key not in _NEUTRAL_KEYS and not str(key).endswith(("dropout", "_drop", "pdrop"))
        }
    return value
