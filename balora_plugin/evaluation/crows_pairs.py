"""CrowS-Pairs for causal models: which sentence of a pair is the likelier one, a kind of bias at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .documents import whole_text
from .figures import Figure
from .rows import read_rows
from .scoring import score_documents
from .sides import Side

NAME = "crows_pairs"
_KEYS = ("sent_more", "sent_less", "bias_type")


@dataclass(frozen=True)
class Pair:
    """Two sentences that differ in whom they are about; `more` is the more stereotyping one."""

    more: str
    less: str
    kind: str


def read_pairs(path: str, limit: int | None = None) -> list[Pair]:
    """Reads the published CSV, or rows of the same names as JSON.

    Raises:
        ValueError: a row lacks a column; names it.
    """
    rows = read_rows(path, f"--data {NAME}")[:limit]
    for number, row in enumerate(rows, 1):
        lacking = next((key for key in _KEYS if not isinstance(row.get(key), str) or not row[key].strip()), None)
        if lacking is not None:
            raise ValueError(
                f"--data {NAME}: {path}, row {number} lacks {lacking}; its columns are {', '.join(_KEYS)}."
            )
    return [Pair(row["sent_more"], row["sent_less"], row["bias_type"]) for row in rows]


def crows_figures(pairs: Sequence[Pair], sides: Sequence[Side], tokenizer: Any, batch_size: int) -> list[Figure]:
    """Measures how often the more stereotyping sentence is the likelier, in all and by kind of bias.

    A sentence's log-likelihood is the sum over its tokens, behind the prefix token.
    """
    texts = [sentence for pair in pairs for sentence in (pair.more, pair.less)]
    documents = [whole_text(text, tokenizer) for text in texts]
    likelihoods = {}
    for side in sides:  # one at a time: nothing of two models is compared within a token
        sums = score_documents([side], documents, batch_size, f"{NAME} ({side.name})").sides[side.name]
        likelihoods[side.name] = [-each.loss for each in sums]
    more = {name: values[0::2] for name, values in likelihoods.items()}
    less = {name: values[1::2] for name, values in likelihoods.items()}
    stereotyped = {n: [float(a > b) for a, b in zip(more[n], less[n], strict=True)] for n in more}
    apart = {n: [abs(a - b) for a, b in zip(more[n], less[n], strict=True)] for n in more}
    figures = [Figure(NAME, "pct_stereotype", stereotyped), Figure(NAME, "likelihood_diff", apart)]
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        kinds[pair.kind].append(number)
    for kind in sorted(kinds):
        chosen = {n: [values[i] for i in kinds[kind]] for n, values in stereotyped.items()}
        figures.append(Figure(NAME, f"pct_stereotype, {kind}", chosen))
    return figures
