"""A0 and B0 of all layers: each matrix factorised once in a job, the work split over its ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import gather_params_ctx
from torch import Tensor
from tqdm.auto import tqdm

from ...distributed import collective_device, gather_objects, process_rank, raise_on_every_process, world_size
from ..delta import base_matrix, base_parameter
from .disk_cache import StartCache, cache_directory

logger = logging.getLogger(__name__)
Read = Callable[[str], Tensor | None]


@torch.no_grad()
def start_layers(
    layers: list[tuple[str, LoraLayer]], adapter_name: str, *, fast: bool, read: Read | None = None
) -> None:
    """Fills A0, B0 of every (name, layer) from its base weight (dequantised), or from what `read(name)` gives instead.

    On several ranks layer i is factorised by one of them and sent to all: by rank i modulo the number of ranks, or by
    those ranks alone whose base weights are loaded. All ranks must call this, with the same layers.

    Raises:
        ValueError: a rank too large, NaN in a weight (on every rank at once); names the layer.
    """
    world, rank = world_size(), process_rank()
    able = _ranks_with_weights(layers)
    owners = [able[i % len(able)] for i in range(len(layers))]
    cache = StartCache(cache_directory())
    bar = tqdm(
        total=owners.count(rank),
        desc=f"BA-LoRA start ({'pissa_fast' if fast else 'pissa'})",
        disable=True if rank else None,  # None: no bar into a file
    )
    waiting: dict[int, Tensor] = {}
    error = None

    def factorise(i: int, weight: Tensor) -> str | None:
        name, layer = layers[i]
        try:
            a, b = cache.factors(weight, layer.r[adapter_name], layer.scaling[adapter_name], fast=fast)
        except ValueError as problem:
            return f"{name}: {problem}"
        _fill(layer, adapter_name, a, b)
        bar.update()
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


def _fill(layer: LoraLayer, adapter_name: str, a: Tensor, b: Tensor) -> None:
    """Copies A0 (r, in) and B0 (out, r) into a layer, or those of experts, (E, r, in) and (E, out, r)."""
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


def _say(cache: StartCache) -> None:
    """Logs how many matrices were read from the disk, where any are kept there."""
    if cache.found or (cache.directory is not None and cache.computed):
        logger.info(
            f"BA-LoRA: A0 and B0 of {cache.found} matrices read from {cache_directory()}, {cache.computed} factorised."
        )


def _ranks_with_weights(layers: list[tuple[str, LoraLayer]]) -> list[int]:
    """Returns the ranks whose base weights are loaded (a host that saves CPU memory loads them on rank 0 alone)."""
    loaded = gather_objects(all(base_parameter(layer).device.type != "meta" for _, layer in layers))
    return [rank for rank, whole in enumerate(loaded) if whole] or [0]
