"""docs/architectures.md: what became of each architecture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import peft
import torch
import transformers

from .families import CAUSAL_LM, CLASSIFIER, CLASSIFIERS, LANGUAGE_MODELS, PAPER
from .journey import Outcome

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_INTRODUCTION = """# Architectures

Written by `make test-models` (torch {torch}, transformers {transformers}, peft {peft}). Each row is the real class of
transformers with small numbers, random weights and `target_modules="all-linear"`. A row that says *works* was taken
through what follows; an empty cell was not tried.

- at step 0 the adapted model gives the pre-trained model's logits bit for bit, and the consistency term is 0;
- after three steps each term equals a dense reference, made of the model's own logits with the adapter on and off, and
  so does the gradient of the loss;
- the saved adapter gives the same logits in plain PEFT;
- the run resumed from its second step ends in the same bits;
- `balora export` gives the same logits, and `--merge` the same model (of language models).

Models with image or audio inputs stand in [the design of `pretrained/`](design/pretrained.md). An architecture that is
not here is checked when it is loaded: the logits are computed from the hidden states and compared, and a model whose
logits cannot be had that way is refused.
"""


def page(outcomes: Iterable[Outcome]) -> str:
    """Returns the page, one row a family."""
    found = {(outcome.task, outcome.family): outcome for outcome in outcomes}
    versions = {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    lines = [
        _INTRODUCTION.format(**versions),
        "| family | language model | classifier | of the paper |",
        "|---|---|---|---|",
    ]
    paper = {family: models for models, family in PAPER.items()}
    for family in [*LANGUAGE_MODELS, *(name for name in CLASSIFIERS if name not in LANGUAGE_MODELS)]:
        cells = [cell(found.get((task, family))) for task in (CAUSAL_LM, CLASSIFIER)]
        lines.append(f"| `{family}` | {cells[0]} | {cells[1]} | {paper.get(family, '')} |")
    return "\n".join(lines) + "\n"


def cell(outcome: Outcome | None) -> str:
    """Returns the words for one outcome; empty where the journey was not made."""
    if outcome is None:
        return ""
    return "works" if outcome.targets else f"refused: {outcome.why}"
