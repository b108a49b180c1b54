"""Rows of all data-parallel ranks as one matrix, with a gradient: batch statistics over the global micro-batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import world_size


def gather_rows(rows: Tensor) -> Tensor:
    """(n, D) of every rank -> (sum of n, D), the same on all; ranks may have different n.

    The gradient that reaches a rank's own rows is multiplied by the number of ranks: each computes the same statistic
    with the same weight and the gradients are averaged over ranks, so the average is the statistic's gradient. (Summing
    what all ranks send back would be a second collective in the backward pass for the same number.)
    """
    return rows if world_size() == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ranks, own = dist.get_world_size(), dist.get_rank()
        count = torch.tensor([rows.shape[0]], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(ranks)]
        dist.all_gather(counts, count)
        sizes = [int(c) for c in counts]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows.detach()
        pieces = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(pieces, padded)
        ctx.ranks, ctx.start, ctx.size = ranks, sum(sizes[:own]), rows.shape[0]
        return torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][ctx.start : ctx.start + ctx.size] * ctx.ranks
