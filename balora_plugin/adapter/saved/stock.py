"""The stock pair of a saved adapter: the config and the tensors that unmodified PEFT reads (docs/file-format.md).

It is a LoRA of rank 2r for the original base, A = [dA; A0 + dA] and B = [B0, dB], with the same scaling.
"""

from __future__ import annotations

import math
import os

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from ...checkpoint.names import WEIGHTS_FILE
from ..config import BaLoraConfig, alpha_for
from ..delta import FROZEN, PEFT_PREFIX, delta_layers_of, num_experts, stack_factors, target_key


def stock_config(config: BaLoraConfig, model: PeftModel, adapter_name: str) -> LoraConfig:
    """Returns the LoraConfig of an adapter's saved file: [`BaLoraConfig.to_stock_config`], made right for its layers.

    Patterns are written per layer where their own form, read back by PEFT, would give a layer something else (rsLoRA;
    overlapping patterns, whose order the file loses). Of fused experts it has no lora_dropout, with which PEFT would
    not load them, and which does nothing to an adapter that is used.
    """
    stock = config.to_stock_config()
    if any(isinstance(layer, ParamWrapper) for layer in model.modules()):
        stock.lora_dropout = 0.0
    if not config.delta or not (config.rank_pattern or config.alpha_pattern):
        return stock
    layers = [(target_key(name, layer), layer) for name, layer in delta_layers_of(model, adapter_name)]
    here = {key: (2 * layer.r[adapter_name], layer.scaling[adapter_name]) for key, layer in layers}
    if all(rank_and_scaling(stock, key, written=True) == own for key, own in here.items()):
        return stock
    stock.rank_pattern = {key: 2 * layer.r[adapter_name] for key, layer in layers}
    stock.alpha_pattern = {
        key: alpha_for(layer.scaling[adapter_name], 2 * layer.r[adapter_name]) for key, layer in layers
    }
    return stock


def rank_and_scaling(config: LoraConfig, key: str, *, written: bool = False) -> tuple[int, float]:
    """Returns the rank and the scaling that PEFT gives the module or parameter `key`.

    `written`: when it reads `config` back from a file, where the keys of patterns are sorted.
    """
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    order = sorted if written else list
    rank = ranks.get(get_pattern_key(order(ranks), key), config.r)
    alpha = alphas.get(get_pattern_key(order(alphas), key), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def delta_layers(model: PeftModel, adapter_name: str) -> list[tuple[str, LoraLayer]]:
    """Returns (name as it stands in state dicts, layer) of every layer with `adapter_name` in delta form."""
    return [(PEFT_PREFIX + name, layer) for name, layer in delta_layers_of(model, adapter_name)]


def to_stock_state_dict(model: PeftModel, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state_dict` of the whole model with this adapter's tensors replaced by the stock rank-2r pair.

    A dict gathered by a sharded trainer may lack the frozen factors: they are completed from the model if it holds them
    whole. Refused, never half-written: a dict without the trained factors, tensors of another shape, or split ones.

    Raises:
        ValueError: names the tensor that is missing, of another shape, or split over processes.
    """
    stock = {key: value for key, value in state_dict.items() if not any(f".{name}." in key for name in FROZEN)}
    for name, layer in delta_layers(model, adapter_name):
        tensors = {}
        for attribute in ("lora_A", "lora_B", *FROZEN):
            key = f"{name}.{attribute}.{adapter_name}.weight"
            module = getattr(layer, attribute)[adapter_name]
            value = state_dict.get(key)
            if value is None and attribute in FROZEN:
                value = module.weight.detach()
            flaw = _flaw(value, (module.out_features, module.in_features))
            if value is None or flaw:
                raise ValueError(
                    f"cannot save BA-LoRA adapter {adapter_name!r}: {key} is {flaw} the state dict. Save with the "
                    "trainer's save_model on every process, or gather the full state dict first (FSDP2: "
                    "get_model_state_dict; ZeRO-3: stage3_gather_16bit_weights_on_model_save)."
                )
            tensors[attribute] = value.detach()
        a, b = stack_factors(
            tensors["lora_A"], tensors["lora_B"], tensors["frozen_A"], tensors["frozen_B"], num_experts(layer)
        )
        stock[f"{name}.lora_A.{adapter_name}.weight"] = a
        stock[f"{name}.lora_B.{adapter_name}.weight"] = b
    return stock


def _flaw(value: Tensor | None, expected: tuple[int, int]) -> str:
    if value is None:
        return "missing from"
    if tuple(value.shape) != expected:
        return f"{tuple(value.shape)}, not {expected}, in"
    # one process saves: to touch a tensor that all of them hold parts of, it would wait for the others
    return "split over processes in" if hasattr(value, "full_tensor") else ""


def check_stock_file(directory: str, model: PeftModel, adapter_name: str) -> None:
    """Asserts that the written file holds exactly the stock pair of every layer, at the scaling PEFT will compute.

    Raises:
        RuntimeError: a frozen factor leaked in, a layer is missing, or the scaling would differ.
    """
    saved = LoraConfig.from_pretrained(directory)
    with safe_open(os.path.join(directory, WEIGHTS_FILE), framework="pt") as file:
        names = list(file.keys())
    lora_keys = {key for key in names if ".lora_" in key or "frozen_" in key}
    expected = set()
    for name, layer in delta_layers(model, adapter_name):
        expected |= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
        key = target_key(name.removeprefix(PEFT_PREFIX), layer)
        rank, scaling = rank_and_scaling(saved, key, written=True)
        both = torch.tensor([scaling, layer.scaling[adapter_name]], dtype=torch.float32)
        if rank != 2 * layer.r[adapter_name] or both[0] != both[1]:
            raise RuntimeError(
                f"the saved config would give layer {key} rank {rank} and scaling {scaling} instead of "
                f"{2 * layer.r[adapter_name]} and {layer.scaling[adapter_name]}: please report this."
            )
    if lora_keys != expected:
        raise RuntimeError(
            f"the saved adapter is not exactly the stock factors: unexpected {sorted(lora_keys - expected)[:3]}, "
            f"missing {sorted(expected - lora_keys)[:3]}: please report this."
        )
