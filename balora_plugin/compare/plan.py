"""What a comparison is: its settings, and the cells of its grid. Nothing heavy."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import RECOMMENDED, RegularizerConfig, as_regularizers
from ..samples.jsonl import Samples
from ..samples.split import digest_of
from ..weights.off import without_terms

METHODS = ("lora", "lora_terms", "pissa", "ba_lora", "full")
WITH_TERMS = ("lora_terms", "ba_lora")
WITHOUT = {"lora_terms": "lora", "ba_lora": "pissa"}  # a method with terms and the one of its start without
FROM_LORA = ("lora", "lora_terms")  # the others' adapters have PiSSA's start
LORA_RATES, PISSA_RATES = (2e-4, 1e-3), (2e-5, 1e-4)  # docs/choose.md: a PiSSA start moves the weights further
_COMMA = re.compile(r"=.*,\s*\w+=")  # key=value,key=value


@dataclass(frozen=True)
class GridSettings:
    """What all cells share.

    Attributes:
        model: A directory or a hub id.
        steps: Optimizer steps of a run.
        rank: Of the adapters; alpha is the same number.
        batch: Rows of an optimizer step.
        max_length: Tokens that a row is cut to.
        terms: Those of WITH_TERMS; the others measure them at weight 0.
        data: The digest of the training and the held-out rows.
    """

    model: str
    steps: int
    rank: int
    batch: int
    max_length: int
    terms: RegularizerConfig
    data: str

    def terms_of(self, method: str) -> RegularizerConfig:
        """Returns a method's terms, all of them measured in evaluation."""
        terms = self.terms if method in WITH_TERMS else without_terms(self.terms)
        often = min(self.terms.share_interval, max(1, self.steps // 10))  # 0: never
        return dataclasses.replace(terms, share_interval=often, monitor=True)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    method: str
    rate: float
    seed: int

    def name(self, recipe: GridSettings) -> str:
        """Returns the name of its directory: another recipe's cell has another one, other methods' terms aside."""
        values = dataclasses.asdict(dataclasses.replace(recipe, terms=recipe.terms_of(self.method)))
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.method}-{self.rate:g}-seed{self.seed}-{digest}"

    def __str__(self) -> str:
        return f"{self.method}, learning rate {self.rate:g}, seed {self.seed}"


def rows_digest(train: Samples, held_out: Samples) -> str:
    """Returns the SHA-256 of the rows on both sides, in their order."""
    return digest_of([train.rows, held_out.rows, train.classes])


def grid(methods: Sequence[str], rates: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """Returns the cells, each once; without `rates` each method has those that suit its start."""
    return [
        Cell(method, rate, seed)
        for method in dict.fromkeys(methods)
        for rate in dict.fromkeys(rates or (LORA_RATES if method in FROM_LORA else PISSA_RATES))
        for seed in dict.fromkeys(seeds)
    ]


def default_steps(rows: int, batch: int) -> int:
    """Returns three passes over the rows, from 20 to 200 steps."""
    return min(200, max(20, -(-3 * rows // batch)))


def terms_from(preset: str | None, words: list[str]) -> RegularizerConfig:
    """Returns the terms of a preset (None: the recommended ones), with what `words` (`key=value`) say otherwise.

    Raises:
        ValueError: a word that is none, an unknown key or a value out of range.
    """
    values: dict[str, Any] = dict(RECOMMENDED) if preset is None else {"preset": preset}
    for word in words:
        if _COMMA.search(word) and "{" not in word:
            apart = re.sub(r",\s*", " ", word)
            raise ValueError(f"--terms {word}: separate them by spaces: --terms {apart}")
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"--terms {word}: write key=value, such as lambda_consistency=0.5.")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    try:
        return as_regularizers(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--terms {error}") from None
