"""What a YAML's training takes, counted on shapes: bytes of a GPU, and FLOP a token. No weights, no data, no GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

from balora_plugin.hosts.axolotl import shapes, workload
from balora_plugin.hosts.axolotl.method import spelled_out
from balora_plugin.memory.estimate import GIB

from .bases import config_of


@dataclass(frozen=True)
class Counted:
    """One training's needs.

    Attributes:
        gib: GiB of tensors on one GPU at the fullest moment of a step; of a split base, on each of `gpus`.
        gpus: How many share the base.
        flop: FLOP a token, of both forward passes, the backward pass and what checkpointing computes again.
    """

    gib: float
    gpus: int
    flop: float


class _Size(NamedTuple):
    """What a model with some number of layers takes: bytes held, bytes beside them by moment, one layer's, FLOP."""

    held: float
    passing: dict[str, float]
    layer: int
    flop: float


def counted(values: dict[str, Any]) -> Counted:
    """Returns what a YAML's training takes, from two models of few layers: all of it is linear in their number.

    Raises:
        ValueError: its model cannot be made of shapes alone.
    """
    gpus = 8 if values.get("fsdp_config") or str(values.get("deepspeed")).endswith("zero3.json") else 1
    layers, period = layers_of(values)
    few, more = at_layers(values, 2 * period), at_layers(values, 3 * period)

    def extended(low: float, high: float) -> float:
        return low + (high - low) * (layers - 2 * period) / period

    passing = max(extended(few.passing[moment], more.passing[moment]) for moment in few.passing)
    if gpus > 1:  # a layer is whole while it computes, and the next one on its way
        passing += 2 * few.layer
    return Counted((extended(few.held, more.held) / gpus + passing) / GIB, gpus, extended(few.flop, more.flop))


def layers_of(values: dict[str, Any]) -> tuple[int, int]:
    """Returns how many layers the base model has, and after how many their kinds repeat."""
    config = config_of(values).get_text_config()
    kinds = list(getattr(config, "layer_types", None) or [])
    period = next((n for n in range(1, 9) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False))), 1)
    return config.num_hidden_layers, period


def at_layers(values: dict[str, Any], layers: int) -> _Size:
    """Returns what it takes with so many layers."""
    given = {**spelled_out(values), "gradient_checkpointing": _checkpoints(values)}
    with mock.patch.object(shapes, "load_model_config", lambda cfg: config_of(cfg, layers)):
        case = workload.case_of(given)
        found = case.estimate()
    held = found.weights + found.frozen_factors + found.trained + found.optimizer
    passing = {moment: float(total - held) for moment, total in found.by_moment.items()}
    layer = _largest_layer(case.twin.base)
    return _Size(held, passing, layer, flop_a_token(case.twin.model, given, case.work))


def _checkpoints(values: dict[str, Any]) -> bool:
    return bool(
        values.get("gradient_checkpointing") or (values.get("fsdp_config") or {}).get("activation_checkpointing")
    )


def _largest_layer(base: nn.Module) -> int:
    layers = [m for m in base.modules() if type(m).__name__.endswith("DecoderLayer")]
    return max((sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers), default=0)


def flop_a_token(model: nn.Module, values: dict[str, Any], work: Any) -> float:
    """Returns the FLOP of one training token: 2 a multiplication, products of matrices alone.

    A frozen matrix of n entries takes 2 n in a forward pass and 2 n for the gradient of its input; one that trains 2 n
    more for its own. The head is multiplied by the counted tokens of student and teacher, and once for the gradient.
    Of fused experts those count that a token is sent to. Attention is counted whole, as its kernels' products are.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else model.base_model.config
    head = base_head(model)
    frozen = trained = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or parameter is head or "embed" in name or "wte" in name or "wpe" in name:
            continue
        if any(part in name for part in ("vision", "visual", "multi_modal", "embed_vision", "audio")):
            continue
        entries = parameter.numel() * (_active(config) if parameter.dim() == 3 else 1)
        if parameter.requires_grad:
            trained += entries
        else:
            frozen += entries
    attention = _attention(config, work.length)
    forward = 2 * (frozen + trained) + attention
    adapters = 2 * sum(p.numel() for n, p in model.named_parameters() if "lora_" in n or "frozen_" in n)
    backward = 2 * frozen + 4 * trained + 2 * attention
    again = forward if work.checkpointing else 0
    teacher = 0 if work.cached or not work.terms.lambda_consistency else forward - adapters
    rows = head.numel() if head is not None else 0
    heads = 2 * rows * (2 + bool(teacher))
    return forward + again + backward + teacher + heads


def base_head(model: nn.Module) -> torch.Tensor | None:
    """Returns the weight of a language model's head."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return None if head is None else head.weight


def _active(config: Any) -> float:
    """The part of its experts that a token is sent to."""
    chosen = next((getattr(config, k) for k in ("num_experts_per_tok", "moe_k", "top_k_experts") if _has(config, k)), 1)
    several = ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
    return chosen / next((getattr(config, key) for key in several if _has(config, key)), 1)


def _has(config: Any, key: str) -> bool:
    return bool(getattr(config, key, None))


def _attention(config: Any, length: int) -> float:
    """The products of queries with keys, and of their weights with values, of the layers that have them."""
    kinds = list(getattr(config, "layer_types", None) or [])
    every = getattr(config, "per_layer_config", None)  # Gemma 4's layers have heads of two widths
    layers = list(every) if every is not None else [config] * config.num_hidden_layers
    kinds += ["full_attention"] * (len(layers) - len(kinds))
    return sum(
        4.0 * length * _width(layer) for kind, layer in zip(kinds, layers, strict=False) if kind != "linear_attention"
    )


def _width(config: Any) -> int:
    heads: int = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def gpu_hours(flop: float, tokens: float, peak: float, used: float = 0.4) -> float:
    """Returns the hours of one GPU of `peak` FLOP/s, of which a part is `used`."""
    return flop * tokens / (peak * used) / 3600


def rounded_up(gib: float) -> int:
    """Returns whole GiB, never less than what was counted."""
    return math.ceil(gib)
