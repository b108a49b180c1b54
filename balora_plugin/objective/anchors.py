"""Anchor rows of one micro-batch: put beside its own rows for one pass, and their consistency from its states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..fused import TopLogProbs
from ..fused.loss import TeacherStates, TermForm, TokenLoss
from ..teacher.documents import BOUNDARIES
from .causal_lm_terms import token_sums
from .request import AnchorRows, AnchorTerm

_EDGES = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")
_KINDS = ("token_type_ids", "mm_token_type_ids")
_TOKENS = ("input_ids", "attention_mask", "position_ids", *_KINDS)


@dataclass
class Joined:
    """A batch with anchors beside its rows.

    Attributes:
        inputs: What the student's backbone is given.
        places: Of the anchors' tokens, in order, in its flattened positions: (M,).
        own: (B', L') bool: the batch's own tokens, for a router's loss.
    """

    inputs: dict[str, Any]
    places: Tensor
    own: Tensor


def join(inputs: dict[str, Any], anchors: AnchorRows) -> Joined:
    """Puts anchors beside a batch's rows, each a row of its own; behind its documents where a row holds several.

    inputs: the backbone's keywords, input_ids (B, L) among them. Rows are made equally long on the right, where a
    causal model has read all of theirs before. The batch's own positions stay where they are: [:B, :L].

    Raises:
        ValueError: a batch of embeddings, or one with a tensor that has no meaning for another row.
    """
    _check(inputs)
    ids, mask, positions = (inputs.get(name) for name in _TOKENS[:3])
    assert isinstance(ids, Tensor)
    numbered = mask is not None and positions is not None and len(ids) == 1 and bool(mask.max() > 1)
    if len(ids) == 1 and positions is not None and (mask is None or numbered):
        return _behind(inputs, anchors)
    return _below(inputs, anchors)


def anchor_term(hidden: Tensor, joined: Joined | None, anchors: AnchorRows, form: TermForm, heads: Any) -> AnchorTerm:
    """The consistency over anchors from the student's states of the joined batch.

    Args:
        hidden: (B', L', d).
        joined: None where there are no rows.
        anchors: Their teacher.
        form: Of the consistency term.
        heads: (the student's head, the teacher's or None where its log-probabilities are kept).
    """
    device = heads[0].weight.device
    part = torch.tensor(1.0 / anchors.parts, device=device)
    if joined is None or anchors.teacher is None:
        nothing = torch.zeros((), device=device)
        return AnchorTerm(nothing, nothing, torch.zeros((), dtype=torch.int64, device=device), part)
    rows = hidden.to(device).flatten(0, 1)[joined.places.to(device)].unsqueeze(0)
    if isinstance(anchors.teacher, TopLogProbs):
        teacher: TeacherStates | TopLogProbs = TopLogProbs(*(x.unsqueeze(0) for x in anchors.teacher))
    else:
        teacher = TeacherStates(anchors.teacher.unsqueeze(0), heads[1])
    loss = TokenLoss(
        head=heads[0].alone,
        teacher=teacher,
        form=form,
        weights=torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64),
    )
    targets = torch.zeros(rows.shape[:2], dtype=torch.int64, device=device)  # of a task that weighs nothing
    sums = token_sums(rows, targets, loss)
    return AnchorTerm(sums[0] * (anchors.weight / anchors.whole), sums[2], sums[6], part)


def _below(inputs: dict[str, Any], anchors: AnchorRows) -> Joined:
    """Anchors as rows below the batch's."""
    rows, length = inputs["input_ids"].shape
    longest = max(length, anchors.ids.shape[1])
    more = {"input_ids": anchors.ids, "attention_mask": anchors.counted, **dict.fromkeys(_KINDS, anchors.ids * 0)}
    joined = dict(inputs)
    for name in _TOKENS:
        value = inputs.get(name)
        if value is None:
            continue
        if name == "position_ids":
            joined[name] = _positions_below(value, rows, anchors, longest)
            continue
        added = more[name].to(value)
        joined[name] = torch.cat([_widened(value.expand(rows, length), longest), _widened(added, longest)])
    own = torch.zeros(rows + len(anchors.ids), longest, dtype=torch.bool, device=anchors.ids.device)
    own[:rows, :length] = True if inputs.get("attention_mask") is None else inputs["attention_mask"] != 0
    counted = F.pad(anchors.counted, (0, longest - anchors.ids.shape[1], rows, 0))
    return Joined(joined, counted.flatten().nonzero().squeeze(-1), own)


def _positions_below(value: Tensor, rows: int, anchors: AnchorRows, longest: int) -> Tensor:
    """Positions ([3,] B, L) with those of the anchors below; padding continues its row, so that it begins none."""
    wide = value.expand(*value.shape[:-2], rows, value.shape[-1])
    steps = torch.arange(1, longest - value.shape[-1] + 1, device=value.device)
    wide = torch.cat([wide, wide[..., -1:] + steps.to(wide)], dim=-1)
    new = torch.arange(longest, device=value.device).to(wide).expand(*value.shape[:-2], len(anchors.ids), longest)
    return torch.cat([wide, new], dim=-2)


def _widened(value: Tensor, longest: int) -> Tensor:
    return F.pad(value, (0, longest - value.shape[1]))


def _behind(inputs: dict[str, Any], anchors: AnchorRows) -> Joined:
    """Anchors as documents behind those of the batch's one row."""
    ids, mask, positions = (inputs.get(name) for name in _TOKENS[:3])
    assert ids is not None and positions is not None
    lengths = anchors.counted.sum(dim=1)
    tokens = anchors.ids[anchors.counted].unsqueeze(0)
    length = ids.shape[1]
    fresh = torch.cat([torch.arange(int(n), device=positions.device) for n in lengths]).to(positions)
    numbers = torch.repeat_interleave(torch.arange(1, len(lengths) + 1, device=lengths.device), lengths).unsqueeze(0)
    joined = dict(inputs)
    joined["input_ids"] = torch.cat([ids, tokens.to(ids)], dim=1)
    joined["position_ids"] = torch.cat([positions, fresh.expand(*positions.shape[:-1], -1)], dim=-1)
    for name in ("attention_mask", "seq_idx"):
        value = inputs.get(name)
        if value is not None:
            joined[name] = torch.cat([value, (numbers + value.max()).to(value)], dim=1)
    for name in _KINDS:
        if inputs.get(name) is not None:
            joined[name] = F.pad(inputs[name], (0, tokens.shape[1]))
    for name in _EDGES:
        if inputs.get(name) is not None:
            joined[name] = torch.cat([inputs[name], (length + lengths.cumsum(0)).to(inputs[name])])
    for name in _LONGEST:
        if inputs.get(name) is not None:
            joined[name] = max(int(inputs[name]), int(lengths.max()))
    own = torch.zeros(joined["input_ids"].shape, dtype=torch.bool, device=ids.device)
    own[:, :length] = True if mask is None else mask != 0
    return Joined(joined, torch.arange(length, own.shape[1], device=ids.device), own)


def _check(inputs: dict[str, Any]) -> None:
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise ValueError(
            "anchor_data: a batch without input_ids has no rows that anchors could stand beside: leave it out."
        )
    rows, length = inputs["input_ids"].shape
    known = {*_TOKENS, *BOUNDARIES}
    for name, value in inputs.items():
        alike = isinstance(value, Tensor) and value.shape[:2] == (rows, length)
        if (alike and name not in known) or (name == "attention_mask" and value is not None and value.ndim != 2):
            raise ValueError(
                f"anchor_data: {name} of shape {tuple(value.shape)} in the batch says nothing of anchors' rows: leave "
                "it out of the batch, or anchor_data out of the settings."
            )
