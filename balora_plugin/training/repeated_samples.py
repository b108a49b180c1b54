"""The samples that accelerate repeats so that all ranks have equal batches: out of an evaluation's last one."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.utils.data import BatchSampler

from ..objective.batches import main_input


def repeated_rows(accelerator: Any, rows: int) -> int:
    """How many of this rank's `rows` in the batch at hand were evaluated before.

    0 for samplers that make batches in a way of their own (multipack): there the number of samples says nothing.
    """
    state = accelerator.gradient_state
    loader = state.active_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder < 1:
        return 0
    if not isinstance(sampler, BatchSamplerShard) or sampler.split_batches:
        return 0
    if type(sampler.batch_sampler) is not BatchSampler:
        return 0
    left = state.remainder - accelerator.process_index * sampler.batch_size
    return rows - min(max(left, 0), rows)


def drop_rows(inputs: dict[str, Any], repeated: int, *, token_labels: bool = True) -> dict[str, Any]:
    """`inputs` without their last `repeated` rows; where that is all, one stays, and does not count.

    Of a batch with pixels, which are not one a row, all rows stay, and the repeated ones do not count.

    A forward pass may be collective, so every rank needs something to run. `token_labels`: labels are one a token, so
    that -100 leaves the row out. A classifier's are left as they are, for -100 is a score like another: its request
    says that nothing counts.
    """
    rows = len(main_input(inputs))
    if repeated and token_labels and any(key.startswith("pixel_values") for key in inputs) and "labels" in inputs:
        again = torch.arange(rows, device=inputs["labels"].device) >= rows - repeated
        return {**inputs, "labels": inputs["labels"].masked_fill(again.unsqueeze(1), -100)}
    kept = max(rows - repeated, 1)
    inputs = {
        key: value[:kept] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
        for key, value in inputs.items()
    }
    if repeated == rows and token_labels and "labels" in inputs:
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    return inputs


def refill(found: Any, repeated: int) -> Any:
    """Logits or labels with as many rows as before, because hosts gather equal shapes and cut the repeats off then."""
    if not isinstance(found, Tensor) or not repeated:
        return found
    return torch.cat([found, found[-1:].expand(repeated, *found.shape[1:])])
