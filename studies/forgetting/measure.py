"""What a point is measured by: loss and drift on rows, and CrowS-Pairs' likelihoods, each document by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from balora_plugin.adapter.delta import delta_weight

from ..quickstart.measure import token_divergences, token_losses
from .data import Pair, Row

BATCH = 8


@dataclass(frozen=True)
class Batch:
    """Padded rows: input_ids, attention_mask [B, L], counted [B, L] of the predicting positions; `order` of the rows.

    Position t predicts token t + 1, so `counted` marks the places before the counted tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    counted: Tensor
    order: list[int]

    def targets(self) -> Tensor:
        """The counted tokens, row by row [N]."""
        return self.input_ids.roll(-1, dims=1)[self.counted]

    def sums(self, values: Tensor) -> Tensor:
        """Sums by row [B] of values by counted token [N]."""
        rows = torch.arange(len(self.order)).unsqueeze(1).expand_as(self.counted)[self.counted]
        return torch.zeros(len(self.order), dtype=values.dtype).index_add_(0, rows, values)


def batches(rows: Sequence[Row], pad: int) -> list[Batch]:
    """The rows in batches of like length."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    made = []
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        length = max(len(rows[index].ids) for index in chosen)
        ids = torch.full((len(chosen), length), pad)
        mask = torch.zeros(len(chosen), length, dtype=torch.long)
        counted = torch.zeros(len(chosen), length, dtype=torch.bool)
        for place, index in enumerate(chosen):
            row = rows[index]
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
            mask[place, : len(row.ids)] = 1
            counted[place, row.counted_from - 1 : len(row.ids) - 1] = True
        made.append(Batch(ids, mask, counted, chosen))
    return made


@torch.no_grad()
def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states of the counted positions [N, d]."""
    states = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return states.last_hidden_state[batch.counted]


@torch.no_grad()
def log_probs(model: Any, hidden: Tensor) -> Tensor:
    """Log-probabilities [N, V], float32, of the model's head."""
    return model.get_output_embeddings()(hidden).float().log_softmax(dim=-1)


@dataclass
class Yardstick:
    """Rows by set and pairs, with the pre-trained model's states on them, and that model to put updates into.

    A language model whose logits are its head's product alone; its head is not adapted.
    """

    base: Any
    sets: Mapping[str, Sequence[Row]]
    pairs: Sequence[Pair]
    pad: int
    _batches: dict[str, list[Batch]] = field(init=False)
    _before: dict[str, list[Tensor]] = field(init=False)
    _crows: list[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self.base.eval().requires_grad_(False)
        self._batches = {name: batches(rows, self.pad) for name, rows in self.sets.items()}
        self._before = {name: [hidden_states(self.base, b) for b in found] for name, found in self._batches.items()}
        both = [row for pair in self.pairs for row in (pair.more, pair.less)]
        self._crows = batches(both, self.pad)

    def look(self, bias: bool = True) -> dict[str, Any]:
        """By set the sums of loss and of drift KL(pre-trained || now) of each row, in nats; by pair the difference of
        the log-likelihoods, more minus less stereotyping.
        """
        found: dict[str, Any] = {name: self._rows(name) for name in self.sets}
        if bias and self.pairs:
            likelihood = torch.zeros(2 * len(self.pairs))
            for batch in self._crows:
                losses = token_losses(log_probs(self.base, hidden_states(self.base, batch)), batch.targets())
                likelihood[batch.order] = -batch.sums(losses)
            found["crows"] = (likelihood[0::2] - likelihood[1::2]).tolist()
        return found

    def _rows(self, name: str) -> dict[str, list[float]]:
        loss, drift = (torch.zeros(len(self.sets[name]), dtype=torch.float64) for _ in range(2))
        for batch, before in zip(self._batches[name], self._before[name], strict=True):
            now = log_probs(self.base, hidden_states(self.base, batch))
            loss[batch.order] = batch.sums(token_losses(now, batch.targets())).double()
            drift[batch.order] = batch.sums(token_divergences(log_probs(self.base, before), now)).double()
        return {"loss": loss.tolist(), "drift": drift.tolist()}

    def counts(self) -> dict[str, list[int]]:
        """Counted tokens of each row, by set."""
        return {name: [len(row.ids) - row.counted_from for row in rows] for name, rows in self.sets.items()}

    @contextmanager
    def adapted(self, model: nn.Module, scale: float) -> Iterator[None]:
        """Makes the base W + scale * update of `model`'s adapter inside the block; afterwards it is as it was."""
        layers = {self.base.get_submodule(name): layer for name, layer in lora_layers(model)}
        try:
            with torch.no_grad():
                for plain, layer in layers.items():
                    plain.weight.copy_(layer.get_base_layer().weight + scale * update_of(layer))
            yield
        finally:
            with torch.no_grad():
                for plain, layer in layers.items():
                    plain.weight.copy_(layer.get_base_layer().weight)


def lora_layers(model: nn.Module, prefix: str = "base_model.model.") -> Iterator[tuple[str, Any]]:
    """The adapted layers with their names in the bare model."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield name.removeprefix(prefix), layer


def update_of(layer: Any) -> Tensor:
    """What the active adapter adds to a layer's weight, float32."""
    adapter = layer.active_adapters[0]
    if adapter in getattr(layer, "frozen_A", {}):
        return delta_weight(layer, adapter)
    return layer.get_delta_weight(adapter).detach()
