"""What a batch says of itself: its counted positions, and where its documents begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..fused.loss import IGNORED
from ..teacher.documents import BOUNDARIES


def main_input(inputs: dict[str, Any]) -> Tensor:
    """What a batch gives a model to read: input_ids (B, L), or inputs_embeds (B, L, d) in their place.

    Raises:
        ValueError: it holds neither.
    """
    for name in ("input_ids", "inputs_embeds"):
        found = inputs.get(name)
        if isinstance(found, Tensor):
            return found
    raise ValueError(
        "the batch holds neither input_ids nor inputs_embeds as a tensor: tokenise the data, and see what its collator "
        "leaves out."
    )


def check_tokens(labels: Tensor, read: Tensor, vocabulary: int) -> None:
    """Refuses labels that are not one token of the vocabulary, or -100, for each that the model reads: (B, L).

    Of labels on an accelerator the values are not asked: that would wait for it.

    Raises:
        ValueError: names the labels and what they have to be.
    """
    if labels.shape != read.shape[:2]:
        raise ValueError(
            f"labels {tuple(labels.shape)} in a batch of {tuple(read.shape[:2])} tokens: write one label a token, -100 "
            "where none counts (a collator that pads input_ids pads labels too)."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"labels are {kind}: write the whole numbers of tokens, -100 where none counts.")
    if labels.device.type != "cpu":
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= vocabulary))]
    if wrong.numel():
        raise ValueError(
            f"labels: {int(wrong[0])} is no token of this model, which has {vocabulary}: write -100 where none counts, "
            "and tokenise the data with the model's own tokenizer."
        )


def without_crossings(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch whose labels say nothing of a document's first token, as where it stands alone in its row.

    In a packed row that token would be predicted from the end of the document before it: TRL masks it, Axolotl's
    collators do not (train_on_inputs: true). inputs: labels (B, L), position_ids (B, L) that begin anew at 0.
    """
    labels, positions = inputs.get("labels"), inputs.get("position_ids")
    if not isinstance(labels, Tensor) or not isinstance(positions, Tensor) or positions.shape != labels.shape:
        return inputs
    return {**inputs, "labels": labels.masked_fill(positions.to(labels.device) == 0, -100)}


def with_boundaries(inputs: dict[str, Any]) -> dict[str, Any]:
    """A packed batch with its documents' edges as flash kernels take them, so that no layer has to look for them.

    transformers finds them in each layer by a branch on the data, which no graph can hold. inputs: position_ids (1, L)
    that begin anew at 0, and no attention_mask; other batches are left as they are.
    """
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or len(positions) != 1:
        return inputs
    if inputs.get("attention_mask") is not None or BOUNDARIES & inputs.keys() or positions[0, 0] != 0:
        return inputs
    edges = F.pad((positions[0] == 0).nonzero().flatten(), (0, 1), value=positions.shape[1]).to(torch.int32)
    longest = int(edges.diff().max())
    return {
        **inputs,
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def counted_positions(inputs: dict[str, Any]) -> Tensor:
    """(B, L) bool: positions that predict a counted label, from `labels` or already shifted `shift_labels`."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"] != -100
    counted = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    counted[:, :-1] = inputs["labels"][:, 1:] != -100  # position t predicts label t + 1
    return counted


def check_task_weights(weights: Tensor, labels: Tensor) -> None:
    """Refuses weights of the task loss that do not fit the batch: labels (B,) or (B, D) of samples, (B, L) of tokens.

    Raises:
        TypeError: they are no tensor.
        ValueError: names the hook, both shapes and what it should return.
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"weigh_ba_lora_task returned {type(weights).__name__}, not a tensor of one weight a sample.")
    if tuple(weights.shape) in {tuple(labels.shape), (labels.shape[0],)}:
        return
    raise ValueError(
        f"weigh_ba_lora_task returned weights of shape {tuple(weights.shape)} for labels of shape "
        f"{tuple(labels.shape)}: return one weight a sample, ({labels.shape[0]},), or one a label."
    )
