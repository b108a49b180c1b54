"""Asks a model, once, whether its packed documents see each other; some do, in every framework."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..distributed import is_sharded
from ..fused.project import project
from ..pretrained.attention import implementation_of
from ..pretrained.backbone import run_backbone
from ..pretrained.lm_head import read_head
from ..pretrained.quantised import quantised_layers_stay_in_training_mode
from ..pretrained.switch import TeacherSwitch

logger = logging.get_logger(__name__)

_LENGTH = 64  # tokens of a document at most
_SHORTEST = 4  # padding has positions of 0, which look like documents of one token
_BATCHES = 16  # so many are looked through for two documents in a row
_FLOOR = 1e-5  # relative difference of states below which nothing is said
_TIMES = 10.0  # what counts as more than rounding


class _Pair(NamedTuple):
    """Two documents of one row: their tokens, and the second one's labels."""

    first: Tensor
    second: Tensor
    labels: Tensor


class PackingProbe:
    """Compares, in the first packed batch of a run, a document behind two different ones; warns where it differs.

    A few passes of the pre-trained model over less than 200 tokens, without gradient or collectives; random states are
    left as they were. What follows a document cannot change it: so much is rounding (of a mixture of experts, or in 8
    bit), and a document that sees the one before it differs by more.
    """

    def __init__(self, model: PreTrainedModel, warn: Callable[[str, str], None]) -> None:
        self._model, self._warn = model, warn
        self._left = _BATCHES

    def look(self, inputs: dict[str, Any]) -> None:
        """Does it with this batch, if it was not done yet and two documents stand in one row of it."""
        positions = inputs.get("position_ids")
        if not self._left or not isinstance(positions, Tensor) or positions.ndim != 2 or "input_ids" not in inputs:
            return
        self._left -= 1
        pair = _two_documents(inputs)
        if pair is None:
            return
        self._left = 0
        if is_sharded(self._model):
            logger.debug("BA-LoRA: the model is sharded, so it was not asked whether packed documents see each other.")
            return
        device = pair.first.device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            TeacherSwitch(self._model).off(),
            quantised_layers_stay_in_training_mode(self._model),
        ):
            self._compare(pair, inputs)

    def _compare(self, pair: _Pair, inputs: dict[str, Any]) -> None:
        first, second, _ = pair
        after = first.flip(0)
        as_is = self._states([first, second, after], inputs)
        behind_another = self._states([self._changed(first), second, after], inputs)
        before_another = self._states([first, second, self._changed(after)], inputs)
        seen, rounding = _apart(as_is, behind_another), _apart(as_is, before_another)
        if seen <= max(_FLOOR, _TIMES * rounding):
            return
        behind, alone = self._loss(as_is, pair), self._loss(self._states([second], inputs, which=0), pair)
        attention = implementation_of(self._model)
        kernel = f" (attn_implementation={attention!r})" if attention else ""
        self._warn(
            "packing",
            f"packed documents see each other: in {type(self._model).__name__}{kernel} a document's task loss is "
            f"{behind:.8g} behind another one and {alone:.8g} alone (its states move by {seen:.1e} with the other's "
            "tokens). Training without BA-LoRA does the same. To train on each document by itself switch packing off "
            "(packing=False, padding_free=False; Axolotl: sample_packing: false), or load the model with an "
            "attn_implementation that keeps them apart, if it has one.",
        )

    def _changed(self, tokens: Tensor) -> Tensor:
        """Other tokens in their place."""
        vocabulary = self._model.config.get_text_config().vocab_size
        return (tokens + 1 + torch.arange(len(tokens), device=tokens.device)) % vocabulary

    def _states(self, documents: list[Tensor], like: dict[str, Any], which: int = 1) -> Tensor:
        """Final hidden states (n, d) of one of the documents, packed into one row as the batch `like` has its own."""
        start = sum(map(len, documents[:which]))
        outputs = run_backbone(self._model, {**_row(documents, like), "use_cache": False})
        return outputs.last_hidden_state[0, start : start + len(documents[which])]

    def _loss(self, states: Tensor, pair: _Pair) -> float:
        """The mean cross-entropy of the second document's counted tokens; of all where none counts."""
        head, targets = read_head(self._model), pair.labels[1:]
        if not bool((targets != -100).any()):
            targets = pair.second[1:]
        logits = project(states[:-1].to(head.weight.device), head)
        return float(F.cross_entropy(logits, targets.to(logits.device)))


def _apart(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over the norm."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _two_documents(inputs: dict[str, Any]) -> _Pair | None:
    """The first two documents that stand in one row; None without any."""
    ids, labels, positions = inputs["input_ids"], inputs.get("labels"), inputs["position_ids"]
    labels = inputs.get("shift_labels") if labels is None else labels
    longest = min(_LENGTH, positions.shape[1] // 3)  # three of them are no longer than a row that the model takes
    if labels is None or longest < _SHORTEST:
        return None
    for row in range(len(positions)):
        edges = [*(positions[row] == 0).nonzero().flatten().tolist(), positions.shape[1]]
        spans = [(start, min(stop, start + longest)) for start, stop in pairwise(edges) if stop - start >= _SHORTEST]
        if len(spans) > 1:
            (first, end), (second, stop) = spans[:2]
            return _Pair(ids[row, first:end], ids[row, second:stop], labels[row, second:stop])
    return None


def _row(documents: list[Tensor], like: dict[str, Any]) -> dict[str, Any]:
    """The documents as one packed row, which says where they begin by the keys that the batch `like` has for it."""
    device, lengths = documents[0].device, [len(document) for document in documents]
    edges = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    number = torch.arange(len(lengths), device=device).repeat_interleave(edges.diff()).to(torch.int32).unsqueeze(0)
    known = {
        "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths]).unsqueeze(0),
        "seq_idx": number,
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    mask = like.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        numbered = bool(mask.max() > 1)  # some collators number the documents in it
        known["attention_mask"] = (number + 1 if numbered else torch.ones_like(number)).to(mask.dtype)
    said = {key: value for key, value in known.items() if like.get(key) is not None}
    return {"input_ids": torch.cat(documents).unsqueeze(0), **said}
