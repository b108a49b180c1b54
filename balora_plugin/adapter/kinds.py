"""What an adapter stands on, and what it leaves out, by kind: matrices of one name, shape and rank."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..pretrained.classifier_head import head_names
from ..pretrained.quantised import is_quantised_linear
from ..pretrained.quantised_experts import EXPERT, own_parameters, quantised_experts, stored_parameter
from .delta import FROZEN, is_delta, num_experts, split_name, target_key
from .start.pissa import started_rank
from .targets import gives_its_product, injected_layers

_OF_AN_ADAPTER = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "modules_to_save", *FROZEN}
_COPIES = {"original_module", "parametrizations"}  # what is there once more, under its own name
_ROUTER = re.compile("router|gate", re.IGNORECASE)


@dataclass(frozen=True)
class Kind:
    """Matrices of a model that differ in the index of their layer alone.

    Attributes:
        stack: The modules around them, an index written as *, such as `model.layers.*`; empty for one outside of any.
        name: Theirs inside it, such as `self_attn.q_proj`; of a parameter (fused experts) with the parameter's name.
        experts: How many matrices each of them holds.
        out_features, in_features: Of one matrix.
        rank: Of their adapter; 0 where they have none.
        started: How many directions the start takes of each: the rank, or all that the matrix has. 0 without a start.
        is_parameter: Whether PEFT reaches them by `target_parameters` alone.
        count: How many there are.
    """

    stack: str
    name: str
    experts: int
    out_features: int
    in_features: int
    rank: int = 0
    started: int = 0
    is_parameter: bool = False
    count: int = 1

    @property
    def numbers(self) -> int:
        """Returns how many numbers of the base they hold together."""
        return self.count * self.experts * self.out_features * self.in_features

    @property
    def frozen(self) -> int:
        """Returns how many numbers their A0 and B0 hold together."""
        factors = self.rank * (self.out_features + self.in_features) if self.started else 0
        return self.count * self.experts * factors

    def __str__(self) -> str:
        of_each = f"{self.experts} experts of " if self.experts > 1 else ""
        return f"{self.count} {self.name} ({of_each}{self.out_features} x {self.in_features})"


@dataclass(frozen=True)
class WhatIsAdapted:
    """What a model's active adapter stands on.

    Attributes:
        kinds: Adapted matrices.
        left_out: Linear layers, fused experts and routers of the base without an adapter. Its head is not counted.
        whole: Modules that train whole beside the adapter (`modules_to_save`).
        rank: The adapter's own; a kind's may differ (`rank_pattern`).
        trained, frozen, base: Numbers that train, of A0 and B0, of the base.
    """

    kinds: tuple[Kind, ...]
    left_out: tuple[Kind, ...]
    whole: tuple[str, ...]
    rank: int
    trained: int
    frozen: int
    base: int

    @property
    def target_parameters(self) -> list[str]:
        """Returns the names that adapt the experts and routers left out, as `target_parameters` takes them."""
        return sorted({kind.name for kind in self.left_out if kind.is_parameter})

    def in_short(self) -> str:
        """Returns it in one line: the numbers, the names, what is left out and the setting that takes it in."""
        whole = f", {', '.join(self.whole)} whole" if self.whole else ""
        words = [f"{_short(self.trained)} of {_short(self.base)} numbers: {_names(self.kinds)}{whole}"]
        if self.left_out:
            share = 100 * sum(kind.numbers for kind in self.left_out) / max(self.base, 1)
            words.append(f"left out, {share:.0f} % of the base: {_names(self.left_out)}")
        if self.target_parameters:
            remedy = f"target_parameters=[{', '.join(self.target_parameters)}] (Axolotl: lora_target_parameters)"
            words.append(f"to take experts and routers in: {remedy}")
        return "; ".join(words)

    def __str__(self) -> str:
        """Returns it in a few lines: the numbers, then each stack's kinds, then what is left out and the remedy."""
        beside = f", A0 and B0 hold {_short(self.frozen)} more" if self.frozen else ""
        numbers = f"{_short(self.trained)} numbers at rank {self.rank}; the base has {_short(self.base)}{beside}."
        lines = [f"BA-LoRA trains {numbers}"]
        lines += [f"  Adapted in {where}: {what}" for where, what in _by_stack(self.kinds, self.rank)]
        if self.whole:
            lines.append(f"  Trained whole: {', '.join(self.whole)}")
        share = 100 * sum(kind.numbers for kind in self.left_out) / max(self.base, 1)
        lines += [f"  Not adapted in {where}: {what}" for where, what in _by_stack(self.left_out, 0)]
        if self.target_parameters:
            names = ", ".join(self.target_parameters)
            lines.append(
                f"  What is not adapted is {share:.0f} % of the base. To adapt its experts and routers too: "
                f"target_parameters=[{names}] (Axolotl: lora_target_parameters)."
            )
        return "\n".join(lines)


def what_is_adapted(model: PeftModel, adapter_name: str | None = None) -> WhatIsAdapted:
    """Returns what an adapter of `model` (None: the active one) stands on and leaves out, by kind.

    Shapes come from the modules, so a base that is quantised or split by ZeRO-3 gives the same.
    """
    name = adapter_name or model.active_adapters[0]
    layers = injected_layers(model, name)
    base = model.get_base_model()
    with_adapter = {target_key(where, layer) for where, layer in layers}
    with_adapter |= {where.removesuffix(".weight") for where in with_adapter}  # a layer reached by its parameter
    free = [matrix for where, matrix in _matrices(base) if where not in with_adapter]
    trained, everything = model.get_nb_trainable_parameters()
    kinds = counted(kind_of(where, layer, name) for where, layer in layers)
    whole = [where for where, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    beside = sum(
        getattr(value, "ds_numel", value.numel())
        for key, value in model.named_parameters()
        if _OF_AN_ADAPTER & {*key.split(".")}
    )
    packed = (stored_parameter(module, key) for _, module, key in quantised_experts(base))
    return WhatIsAdapted(
        kinds=kinds,
        left_out=counted(free),
        whole=tuple(whole),
        rank=model.peft_config[name].r,
        trained=trained,
        frozen=sum(kind.frozen for kind in kinds),
        base=everything - beside + sum(each.numbers - each.original.numel() for each in packed),
    )


def expert_numbers(base: nn.Module) -> int:
    """Returns how many numbers the fused experts of a model without adapters hold."""
    return sum(kind.numbers for _, kind in _matrices(base) if kind.experts > 1)


def kind_of(name: str, layer: LoraLayer, adapter_name: str) -> Kind:
    """Returns the kind of one layer that has an adapter; `name` is its name in the base model."""
    rank, shape = layer.r[adapter_name], (layer.out_features, layer.in_features)
    return Kind(
        *split_name(target_key(name, layer)),
        num_experts(layer),
        *shape,
        rank=rank,
        started=started_rank(rank, *shape) if is_delta(layer, adapter_name) else 0,
        is_parameter=hasattr(layer, "parameter_name"),
    )


def counted(kinds: Iterable[Kind]) -> tuple[Kind, ...]:
    """Returns each kind once, with its count, in the order in which it came first."""
    return tuple(replace(kind, count=count) for kind, count in Counter(kinds).items())


def names_of(kinds: Iterable[Kind]) -> str:
    """Returns the names of kinds, each once, as a line of Markdown."""
    return _names(kinds, "`")


def _names(kinds: Iterable[Kind], quote: str = "") -> str:
    return ", ".join(f"{quote}{name}{quote}" for name in dict.fromkeys(kind.name for kind in kinds))


def _matrices(base: Any) -> Iterator[tuple[str, Kind]]:
    """Yields (name, kind) of every matrix of the base that an adapter could stand on; not the head's."""
    heads = set(head_names(base))
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for name, module in base.named_modules():
        parts = name.split(".")
        if module is output or parts[0] in heads or (_OF_AN_ADAPTER | _COPIES) & {*parts}:
            continue
        if isinstance(module, LoraLayer):
            continue
        where = ".".join(part for part in parts if part != "base_layer")
        if not gives_its_product(module):
            yield (
                where,
                Kind(*split_name(f"{where}.weight"), 1, module.out_features, module.in_features, is_parameter=True),
            )
        elif is_quantised_linear(module) or isinstance(module, nn.Linear):
            yield where, Kind(*split_name(where), 1, module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            yield where, Kind(*split_name(where), 1, module.nf, module.nx)
        else:
            yield from _parameters(where, module)


def _parameters(where: str, module: nn.Module) -> Iterator[tuple[str, Kind]]:
    """Yields the matrices that a module holds without a layer of their own: fused experts, and routers."""
    expert = EXPERT.search(f"{where} {type(module).__name__}")
    for name, parameter in own_parameters(module):
        shape = tuple(parameter.shape)
        full = f"{where}.{name}"
        if expert and len(shape) == 3 and not name.endswith("bias"):
            rows, columns = shape[:0:-1] if getattr(module, "is_transposed", False) else shape[1:]
            yield full, Kind(*split_name(full), shape[0], rows, columns, is_parameter=True)
        elif name == "weight" and len(shape) == 2 and _ROUTER.search(type(module).__name__):
            yield full, Kind(*split_name(full), 1, *shape, is_parameter=True)


def _by_stack(kinds: Iterable[Kind], rank: int) -> Iterator[tuple[str, str]]:
    """Yields (stack, its kinds in words); ranks other than `rank`, or beyond what the matrix has, are named."""
    for stack, members in groupby(sorted(kinds, key=lambda kind: kind.stack), key=lambda kind: kind.stack):
        yield stack or "the model itself", ", ".join(f"{kind}{_rank_in_words(kind, rank)}" for kind in members)


def _rank_in_words(kind: Kind, rank: int) -> str:
    if kind.started and kind.started < kind.rank:
        return f" at rank {kind.rank} of which {kind.started} train"
    return f" at rank {kind.rank}" if kind.rank != rank else ""


def _short(number: int) -> str:
    for unit, name in ((10**9, " billion"), (10**6, " million")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return f"{number:,}"
