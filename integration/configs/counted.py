"""What a YAML's training takes, counted on shapes: bytes of a GPU, and FLOP a token. No weights, no data, no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
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


class Size(NamedTuple):
    """What a model with some number of layers takes.

    Attributes:
        held: Bytes that are held all along, by part.
        passing: Bytes beside them, by moment.
        layer: Bytes of the largest decoder layer.
        flop: FLOP of a token, by part.
        streamed: Numbers that a pass's products read and write of one token, their matrices aside.
        adapted: Entries of the matrices that have an adapter.
    """

    held: dict[str, float]
    passing: dict[str, float]
    layer: int
    flop: dict[str, float]
    streamed: float
    adapted: float


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
    held, flop = (extended(sum(a.values()), sum(b.values())) for a, b in ((few.held, more.held), (few.flop, more.flop)))
    return Counted((held / gpus + passing) / GIB, gpus, flop)


def layers_of(values: dict[str, Any]) -> tuple[int, int]:
    """Returns how many layers the base model has, and after how many their kinds repeat."""
    config = config_of(values).get_text_config()
    kinds = list(getattr(config, "layer_types", None) or [])
    period = next((n for n in range(1, 9) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False))), 1)
    return config.num_hidden_layers, period


def at_layers(values: dict[str, Any], layers: int) -> Size:
    """Returns what it takes with so many layers."""
    given = {**spelled_out(values), "gradient_checkpointing": _checkpoints(values)}
    with mock.patch.object(shapes, "load_model_config", lambda cfg: config_of(cfg, layers)):
        case = workload.case_of(given)
        found = case.estimate()
    held = {part: float(getattr(found, part)) for part in ("weights", "frozen_factors", "trained", "optimizer")}
    passing = {moment: total - sum(held.values()) for moment, total in found.by_moment.items()}
    model = case.twin.model
    flop = flop_by_part(model, given, case.work)
    return Size(held, passing, _largest_layer(case.twin.base), flop, _streamed(model), _adapted(model))


def _checkpoints(values: dict[str, Any]) -> bool:
    return bool(
        values.get("gradient_checkpointing") or (values.get("fsdp_config") or {}).get("activation_checkpointing")
    )


def _largest_layer(base: nn.Module) -> int:
    layers = [m for m in base.modules() if type(m).__name__.endswith("DecoderLayer")]
    return max((sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers), default=0)


def flop_a_token(model: nn.Module, values: dict[str, Any], work: Any) -> float:
    """Returns the FLOP of one training token, see [`flop_by_part`]."""
    return sum(flop_by_part(model, values, work).values())


def flop_by_part(model: nn.Module, values: dict[str, Any], work: Any) -> dict[str, float]:
    """Returns the FLOP of one training token: 2 a multiplication, products of matrices alone.

    A frozen matrix of n entries takes 2 n in a forward pass and 2 n for the gradient of its input; one that trains 2 n
    more for its own. The head is multiplied by the counted tokens of student and teacher, and once for the gradient.
    Of fused experts those count that a token is sent to. Attention is counted whole, as its kernels' products are.
    """
    config = model.config.get_text_config() if hasattr(model, "config") else model.base_model.config
    frozen = trained = 0.0
    for parameter, active in _matrices(model):
        if parameter.requires_grad:
            trained += parameter.numel() * active
        else:
            frozen += parameter.numel() * active
    attention = _attention(config, work.length)
    forward = 2 * (frozen + trained) + attention
    adapters = 2 * sum(p.numel() for n, p in model.named_parameters() if "lora_" in n or "frozen_" in n)
    taught = not (work.cached or not work.terms.lambda_consistency)
    head = base_head(model)
    rows = head.numel() if head is not None else 0
    return {
        "student": forward,
        "recomputed": forward if work.checkpointing else 0,
        "backward": 2 * frozen + 4 * trained + 2 * attention,
        "teacher": forward - adapters if taught else 0,
        "head": 4 * rows,
        "teacher's head": 2 * rows * taught,
    }


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Parameter, float]]:
    """Gives the matrices of the layers, and the part of each that a token is multiplied with."""
    config = model.config.get_text_config() if hasattr(model, "config") else model.base_model.config
    head = base_head(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or parameter is head or "embed" in name or "wte" in name or "wpe" in name:
            continue
        if any(part in name for part in ("vision", "visual", "multi_modal", "embed_vision", "audio")):
            continue
        yield parameter, _active(config) if parameter.dim() == 3 else 1.0


def _streamed(model: nn.Module) -> float:
    """Inputs and outputs of every product, of one token."""
    return sum(
        sum(parameter.shape[-2:]) * (parameter.shape[0] * active if parameter.dim() == 3 else 1)
        for parameter, active in _matrices(model)
    )


def _adapted(model: nn.Module) -> float:
    """Entries of the base's matrices under an adapter."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")]
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in layers]
    return float(sum(weight.numel() for weight in weights if weight is not None))


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
