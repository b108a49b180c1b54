"""A0 and B0 of all layers: each matrix factorised once in a job, the work split over its ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm

from ...distributed import (
    collective_device,
    gather_objects,
    is_loaded,
    process_rank,
    raise_on_every_process,
    world_size,
)
from ..delta import base_matrix, base_parameter, num_experts
from ..kinds import counted, kind_of
from .disk_cache import StartCache, cache_directory

logger = logging.getLogger(__name__)
Read = Callable[[str], Tensor | None]


@torch.no_grad()
def start_layers(
    layers: list[tuple[str, LoraLayer]], adapter_name: str, *, method: str, read: Read | None = None
) -> None:
    """Fills A0, B0 of every (name, layer) from its base weight (dequantised), or from what `read(name)` gives instead.

    `method` is a name of `pissa.TOLERANCES`. A matrix with fewer than r singular triples gives all that it has; the
    rest of A0 and B0 stays zero, which is said.

    On several ranks layer i is factorised by one of them and sent to all: by rank i modulo the number of ranks, or by
    those ranks alone whose base weights are loaded. All ranks must call this, with the same layers.

    Raises:
        ValueError: NaN in a weight (on every rank at once); names the layer.
    """
    _say_small(layers, adapter_name)
    world, rank = world_size(), process_rank()
    able = _ranks_with_weights(layers)
    owners = [able[i % len(able)] for i in range(len(layers))]
    cache = StartCache(cache_directory())
    bar = tqdm(
        total=sum(_entries(layer) for (_, layer), owner in zip(layers, owners, strict=True) if owner == rank),
        desc=f"BA-LoRA start ({method})",
        unit=" weights",  # not layers: the time left goes by the products with a matrix
        unit_scale=True,
        disable=True if rank else None,  # None: no bar into a file
    )
    waiting: dict[int, Tensor] = {}
    error = None

    def factorise(i: int, weight: Tensor) -> str | None:
        name, layer = layers[i]
        bar.set_postfix_str(name)
        try:
            a, b = cache.factors(weight, layer.r[adapter_name], layer.scaling[adapter_name], method=method)
        except ValueError as problem:
            return f"{name}: {problem}"
        _fill(layer, adapter_name, a, b)
        bar.update(_entries(layer))
        return None

    for i, (name, layer) in enumerate(layers):
        parameter = base_parameter(layer)
        with gather_params_ctx(parameter):  # all ranks together, one after another: no time for an SVD
            if owners[i] != rank or error is not None:
                continue
            try:
                weight = read(name) if read is not None else None
                weight = base_matrix(layer) if weight is None else weight
            except ValueError as problem:
                error = f"{name}: {problem}"
                continue
            if hasattr(parameter, "ds_id") and world > 1:
                waiting[i] = weight.detach().to("cpu", copy=True)  # this rank's share of the targeted weights
            else:
                error = factorise(i, weight)
    for i, weight in waiting.items():
        if error is None:
            error = factorise(i, weight.to(layers[i][1].frozen_A[adapter_name].weight.device))
    bar.close()
    raise_on_every_process(error)
    if world > 1:
        _send(layers, adapter_name, owners)
    cache.prune()
    _say(cache)


def _entries(layer: LoraLayer) -> int:
    """Returns how many entries a base weight has, those of all experts together, sharded and quantised ones too."""
    return int(num_experts(layer) * layer.out_features * layer.in_features)


def _fill(layer: LoraLayer, adapter_name: str, a: Tensor, b: Tensor) -> None:
    """Copies A0 (k, in) and B0 (out, k) into a layer of rank r >= k; of experts they are (E, k, in) and (E, out, k)."""
    missing = layer.r[adapter_name] - a.shape[-2]
    if missing:
        a, b = pad(a, (0, 0, 0, missing)), pad(b, (0, missing))
    if a.ndim == 3:  # into PEFT's layout
        a, b = a.reshape(-1, a.shape[-1]), b.permute(1, 2, 0).reshape(b.shape[1], -1)
    layer.frozen_A[adapter_name].weight.copy_(a)
    layer.frozen_B[adapter_name].weight.copy_(b)


def _send(layers: list[tuple[str, LoraLayer]], adapter_name: str, owners: list[int]) -> None:
    """Gives every rank the factors of each layer from the rank that has made them; all ranks must call this."""
    for (_, layer), owner in zip(layers, owners, strict=True):
        for factor in (layer.frozen_A[adapter_name].weight, layer.frozen_B[adapter_name].weight):
            there = factor.device.type != "meta"  # else the host fills it later, but the ranks must keep step
            device = collective_device(factor.device if there else torch.device("cpu"))
            on_wire = factor.to(device) if there else torch.empty_like(factor, device=device)
            dist.broadcast(on_wire, src=owner)
            if there:
                factor.copy_(on_wire)


def _say_small(layers: list[tuple[str, LoraLayer]], adapter_name: str) -> None:
    """Says once of all matrices that have fewer singular triples than their rank how many they are, and which."""
    small = [kind for kind in counted(kind_of(*layer, adapter_name) for layer in layers) if kind.started < kind.rank]
    if small and process_rank() == 0:
        kinds = ", ".join(f"{kind} at rank {kind.rank} of which {kind.started} train" for kind in small)
        logger.warning(
            f"BA-LoRA: {sum(kind.count for kind in small)} of {len(layers)} adapted matrices have fewer singular "
            f"values than the rank: {kinds}. They start with all that they have, and so can become any matrix of their "
            "shape; the rest of their factors is 0 and stays so."
        )


def _say(cache: StartCache) -> None:
    """Logs how many matrices were read from the disk, where any are kept there."""
    if cache.found or (cache.directory is not None and cache.computed):
        logger.info(
            f"BA-LoRA: A0 and B0 of {cache.found} matrices read from {cache_directory()}, {cache.computed} factorised."
        )


def _ranks_with_weights(layers: list[tuple[str, LoraLayer]]) -> list[int]:
    """Returns the ranks whose base weights are loaded (a host that saves CPU memory loads them on rank 0 alone)."""
    loaded = gather_objects(is_loaded(base_parameter(layer) for _, layer in layers))
    return [rank for rank, whole in enumerate(loaded) if whole] or [0]
