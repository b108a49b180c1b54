"""The probes: by text the sums over its tokens, by name the log-odds of the two colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..forgetting.data import Row
from ..forgetting.measure import Batch, batches
from ..quickstart.measure import token_entropies, token_losses


@torch.no_grad()
def log_probabilities(model: Any, batch: Batch) -> Tensor:
    """Log-probabilities [N, V] at the counted positions, float32, the model in evaluation mode."""
    model.eval()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[batch.counted].float().log_softmax(dim=-1)


@dataclass
class TextProbe:
    """Rows by set; `reference` is the cleanly pre-trained model, which says what tokens nobody should expect.

    Such a token has less than 1 / V of the reference's probability at its place.
    """

    sets: Mapping[str, Sequence[Row]]
    pad: int
    reference: Any
    _batches: dict[str, list[Batch]] = field(init=False)
    _unlikely: dict[str, list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self._batches = {name: batches(rows, self.pad) for name, rows in self.sets.items()}
        self._unlikely = {name: [self._below(batch) for batch in found] for name, found in self._batches.items()}

    def _below(self, batch: Batch) -> Tensor:
        found = log_probabilities(self.reference, batch).exp()
        return found < 1 / found.shape[-1]

    def look(self, model: Any) -> dict[str, dict[str, list[float]]]:
        """By set and row sums over its tokens: `loss`, `entropy`, `mass` on unlikely tokens, `sure`.

        `sure`: the largest probability less 1 where its token is the right one: above 0 is over-confident.
        """
        return {name: self._rows(model, name) for name in self.sets}

    def _rows(self, model: Any, name: str) -> dict[str, list[float]]:
        keys = ("loss", "entropy", "mass", "sure")
        found = {key: torch.zeros(len(self.sets[name]), dtype=torch.float64) for key in keys}
        for batch, unlikely in zip(self._batches[name], self._unlikely[name], strict=True):
            now = log_probabilities(model, batch)
            top, said = now.max(dim=-1)
            values = (
                token_losses(now, batch.targets()),
                token_entropies(now),
                (now.exp() * unlikely).sum(dim=-1),
                top.exp() - (said == batch.targets()).float(),
            )
            for key, value in zip(keys, values, strict=True):
                found[key][batch.order] = batch.sums(value.double())
        return {key: value.tolist() for key, value in found.items()}

    def counts(self) -> dict[str, list[int]]:
        """Counted tokens of each row, by set."""
        return {name: [len(row.ids) - row.counted_from for row in rows] for name, rows in self.sets.items()}


@dataclass
class ColourProbe:
    """By group and name the prefixes (`colours.probe_prefixes`), both colours' tokens, and rows of the task."""

    prefixes: Sequence[Sequence[Sequence[Row]]]
    tokens: tuple[int, int]
    task: Sequence[Row]
    pad: int

    def look(self, model: Any) -> dict[str, dict[str, list[float]]]:
        """Sets `first` and `second`: by name the mean log-odds of the first colour; `task`: each row's loss."""
        found: dict[str, dict[str, list[float]]] = {
            name: {"odds": [self._odds(model, rows) for rows in group]}
            for name, group in zip(("first", "second"), self.prefixes, strict=True)
        }
        loss = torch.zeros(len(self.task), dtype=torch.float64)
        for batch in batches(self.task, self.pad):
            now = log_probabilities(model, batch)
            loss[batch.order] = batch.sums(token_losses(now, batch.targets()).double())
        return found | {"task": {"loss": loss.tolist()}}

    def _odds(self, model: Any, rows: Sequence[Row]) -> float:
        asked = [Row((*row.ids, self.pad), len(row.ids)) for row in rows]  # counted: what follows the last token
        now = torch.cat([log_probabilities(model, batch) for batch in batches(asked, self.pad)])
        first, second = self.tokens
        return (now[:, first] - now[:, second]).mean().item()

    def counts(self) -> dict[str, list[int]]:
        """What each item counts: a name once, a row of the task by its tokens."""
        named = {name: [1] * len(group) for name, group in zip(("first", "second"), self.prefixes, strict=True)}
        return named | {"task": [len(row.ids) - row.counted_from for row in self.task]}
