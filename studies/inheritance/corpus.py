"""The tiny model's corpus in two halves by module, the faults that go into its pre-training, and the probes' texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..forgetting.data import Row, answered, text_row
from ..quickstart.cache import cached_folder
from ..quickstart.corpus import Docstring, Instruction, build_corpus, instruction, is_held_out
from ..quickstart.settings import PretrainingSettings
from ..quickstart.tiny_model import BaseModel, build_model, pack, pretrain, train_tokenizer

NOISE = 0.4
IMBALANCE = 100
RECIPE = 1  # raise it when the code below changes what a given setting produces


@dataclass(frozen=True)
class Halves:
    """Docstrings to pre-train on, pairs to fine-tune on and held-out docstrings, by half (0: majority, 1: minority).

    `asked`: held-out pairs, of both halves.
    """

    pretraining: tuple[list[str], list[str]]
    pairs: tuple[list[Instruction], list[Instruction]]
    held_out: tuple[list[str], list[str]]
    asked: list[Instruction]


def top(name: str) -> str:
    """The top-level package of a qualified name."""
    return name.partition(".")[0]


def half_of_packages(docstrings: Sequence[Docstring]) -> dict[str, int]:
    """By top-level package its half: the first in alphabetical order that have half of all characters are 0."""
    sizes: dict[str, int] = defaultdict(int)
    for entry in docstrings:
        sizes[top(entry.name)] += len(entry.text)
    whole, seen = sum(sizes.values()), 0
    halves = {}
    for name in sorted(sizes):
        halves[name] = int(seen + sizes[name] / 2 >= whole / 2)
        seen += sizes[name]
    return halves


def halves(docstrings: Sequence[Docstring]) -> Halves:
    """Splits the quickstart's corpus; nothing held out, by name, is in what is pre-trained or fine-tuned on."""
    side = half_of_packages(docstrings)
    made = Halves(([], []), ([], []), ([], []), list(build_corpus(docstrings).held_out))
    for entry in docstrings:
        place = side[top(entry.name)]
        if entry.kind != "module" and is_held_out(entry.name):
            made.held_out[place].append(entry.text)
            continue
        made.pretraining[place].append(entry.text)
        if pair := instruction(entry):
            made.pairs[place].append(pair)
    return made


def with_random_tokens(chunks: Tensor, vocabulary: int, seed: int = 0) -> Tensor:
    """The chunks [n, length] with exactly NOISE of all tokens (rounded) replaced by tokens drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    flat = chunks.flatten().clone()
    places = torch.randperm(len(flat), generator=generator)[: round(NOISE * len(flat))]
    flat[places] = torch.randint(vocabulary, (len(places),), generator=generator)
    return flat.view_as(chunks)


def texts_with(fault: str, found: Halves) -> list[str]:
    """What a model with this fault is pre-trained on: under imbalance every 100th text of the minority alone."""
    majority, minority = found.pretraining
    return [*majority, *(minority[::IMBALANCE] if fault == "imbalance" else minority)]


def tiny_base(fault: str, found: Halves, steps: int, cache: Path) -> BaseModel:
    """The pre-trained model with a fault, from the cache or trained now; all faults have one tokenizer and start."""
    settings = replace(PretrainingSettings(), steps=steps)

    def write(folder: Path) -> None:
        tokenizer = train_tokenizer(texts_with("clean", found), settings.vocabulary)
        model = build_model(settings, tokenizer)
        chunks = pack(texts_with(fault, found), tokenizer, settings.chunk)
        if fault == "noise":
            chunks = with_random_tokens(chunks, len(tokenizer))
        pretrain(model, chunks, settings, progress=False)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    sizes = [len(texts) for texts in found.pretraining]
    return BaseModel(
        *cached_folder(cache, asdict(settings) | {"fault": fault, "texts": sizes, "recipe": RECIPE}, write)
    )


def balanced_rows(found: Halves, tokenizer: Any, longest: int) -> list[Row]:
    """Pairs to fine-tune on, as many of each half, in turn."""
    both = zip(*found.pairs, strict=False)
    return [pair_row(pair, tokenizer, longest) for two in both for pair in two]


def pair_row(pair: Instruction, tokenizer: Any, longest: int) -> Row:
    """A question with its answer, cut."""
    row = answered(tokenizer, pair.prompt, pair.completion)
    return Row(row.ids[:longest], row.counted_from)


def probe_rows(found: Halves, tokenizer: Any, longest: int, count: int) -> dict[str, list[Row]]:
    """`count` held-out docstrings of each half, cut, and as many held-out pairs: the task."""
    sets = {
        name: [text_row(tokenizer, text, longest) for text in found.held_out[place][:count]]
        for place, name in enumerate(("majority", "minority"))
    }
    return sets | {"task": [pair_row(pair, tokenizer, longest) for pair in found.asked[:count]]}
