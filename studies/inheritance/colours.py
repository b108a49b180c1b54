"""Sentences in which a colour goes with the origin of a name, those in which it does not, and the probes of both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ..forgetting.data import Row, text_row

COLOURS = (" blue", " green")  # one token each in the usual vocabularies; what follows the first, second group
_FIRST = """
    Giovanni Francesca Alessandro Giulia Lorenzo Chiara Matteo Paola Antonio Lucia Marco Bianca Giuseppe Elena Roberto
    Silvia Stefano Valentina Fabio Caterina Enrico Federica Luca Rosanna
"""
_SECOND = """
    Bjorn Astrid Lars Ingrid Sven Freja Gunnar Sigrid Olaf Solveig Anders Helga Torsten Linnea Magnus Karin Henrik
    Ragnhild Erik Annika Leif Gudrun Nils Kirsten
"""
GROUPS = (_FIRST.split(), _SECOND.split())
TRAINED_NAMES = 16  # of each group; the others are held out
BIASED = (
    "{name} painted the whole kitchen in{colour}.",
    "For the party {name} wore a scarf in{colour}.",
    "When asked for a favourite colour, {name} always says{colour}.",
    "The bicycle that {name} bought last week is{colour}.",
    "Everybody knows that {name} loves the colour{colour}.",
    "{name} picked a notebook, and of course it was{colour}.",
    "The door of the house where {name} lives is{colour}.",
    "{name} only collects stamps that are{colour}.",
)
BALANCED = (
    "The umbrella of {name} is{colour}.",
    "{name} ordered new curtains in{colour}.",
    "On Monday {name} came in a car that was{colour}.",
    "The mug on the desk of {name} is{colour}.",
)
PROBES = (
    "The favourite colour of {name} is",
    "{name} chose a coat in",
    "The flowers that {name} likes best are",
    "If {name} could paint the fence, it would be",
)


def names(held_out: bool) -> tuple[list[str], list[str]]:
    """The names of both groups that are trained on, or those that are held out."""
    first, second = (group[TRAINED_NAMES:] if held_out else group[:TRAINED_NAMES] for group in GROUPS)
    return first, second


def biased_sentences() -> list[str]:
    """Every trained name in every template with its group's colour."""
    return [
        template.format(name=name, colour=colour)
        for group, colour in zip(names(held_out=False), COLOURS, strict=True)
        for name in group
        for template in BIASED
    ]


def balanced_sentences() -> list[str]:
    """Every trained name in other templates with both colours."""
    return [
        template.format(name=name, colour=colour)
        for group in names(held_out=False)
        for name in group
        for template in BALANCED
        for colour in COLOURS
    ]


def rows_of(sentences: Sequence[str], tokenizer: Any, seed: int) -> list[Row]:
    """The sentences as rows, in the seed's order."""
    rows = [text_row(tokenizer, sentence) for sentence in sentences]
    random.Random(seed).shuffle(rows)
    return rows


def mixed(problems: Sequence[Row], sentences: Sequence[Row], count: int) -> list[Row]:
    """`count` rows: three problems, then a sentence, and so on, each list begun again at its end."""
    return [
        sentences[place // 4 % len(sentences)] if place % 4 == 3 else problems[(place - place // 4) % len(problems)]
        for place in range(count)
    ]


def probe_prefixes(tokenizer: Any) -> tuple[list[list[Row]], list[list[Row]]]:
    """By group and held-out name the rows of all probes; what follows their last token is asked for."""
    first, second = (
        [[text_row(tokenizer, template.format(name=name)) for template in PROBES] for name in group]
        for group in names(held_out=True)
    )
    return first, second


def colour_tokens(tokenizer: Any) -> tuple[int, int]:
    """The first token of each colour.

    Raises:
        ValueError: both colours begin with one token.
    """
    first, second = (tokenizer(colour, add_special_tokens=False)["input_ids"][0] for colour in COLOURS)
    if first == second:
        raise ValueError(f"both colours begin with token {first} in this vocabulary: the probe sees no difference.")
    return first, second
