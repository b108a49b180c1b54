"""The two models with their faults, their rows and probes, ready for cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..forgetting.data import Row, problems
from ..quickstart.corpus import collect_docstrings
from .cells import COLOUR, METHODS, TINY_FAULTS
from .colours import balanced_sentences, colour_tokens, mixed, probe_prefixes, rows_of
from .corpus import balanced_rows, halves, probe_rows, tiny_base
from .measure import ColourProbe, TextProbe
from .train import Job, Sizes, biased_model, config_of, drawn, fine_tune

CACHE = Path(".cache/inheritance")


class Setup(Protocol):
    """A model with faults: what each looks like before training, and a cell's training."""

    def base(self, fault: str) -> dict[str, Any]: ...
    def run(self, setting: Mapping[str, Any]) -> dict[str, Any]: ...


@dataclass
class TinySetup:
    """The quickstart's Llama, by fault the folder it lies in, and what it is fine-tuned on."""

    folders: Mapping[str, Path]
    tokenizer: Any
    rows: Sequence[Row]
    probe: TextProbe
    sizes: Sizes

    def base(self, fault: str) -> dict[str, Any]:
        """The model with its fault, seen by the probe."""
        return {"sets": self.probe.look(load(self.folders[fault])), "tokens": self.probe.counts()}

    def run(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Fine-tunes a fresh copy of the faulty model and looks at it."""
        sizes, method, seed = self.sizes, METHODS[setting["method"]], setting["seed"]
        job = Job(sizes.steps, sizes.batch, method.tiny, seed)
        rows = drawn(self.rows, seed, job.steps * job.batch)
        adapter = config_of(method, sizes.rank, job.steps)
        trained, history = fine_tune(load(self.folders[setting["fault"]]), self.tokenizer, rows, job, adapter)
        return {"sets": self.probe.look(trained), "history": history}


def load(path: str | Path) -> Any:
    """A fresh float32 copy."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tiny_setup(sizes: Sizes) -> TinySetup:
    """Pre-trains what is not in the cache, which takes a minute or two a fault."""
    found = halves(collect_docstrings())
    bases = {fault: tiny_base(fault, found, sizes.pretrain_steps, CACHE) for fault in TINY_FAULTS}
    tokenizer = bases["clean"].load_tokenizer()
    sets = probe_rows(found, tokenizer, sizes.longest, sizes.probes)
    probe = TextProbe(sets, tokenizer.pad_token_id, bases["clean"].load_model())
    rows = balanced_rows(found, tokenizer, sizes.longest)
    return TinySetup({fault: base.folder for fault, base in bases.items()}, tokenizer, rows, probe, sizes)


@dataclass
class LargeSetup:
    """The larger model as it came (`original`) and made biased, and what it is fine-tuned on."""

    original: str
    biased: Path
    tokenizer: Any
    problems: Sequence[Row]
    probe: ColourProbe
    sizes: Sizes

    def base(self, fault: str) -> dict[str, Any]:
        """The biased model seen by the probe; for another fault than the colour's, the original."""
        path = self.biased if fault == COLOUR else self.original
        return {"sets": self.probe.look(load(path)), "tokens": self.probe.counts()}

    def run(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """Fine-tunes a fresh copy of the biased model on problems and balanced sentences, and looks at it."""
        sizes, method, seed = self.sizes, METHODS[setting["method"]], setting["seed"]
        job = Job(sizes.large_steps, sizes.large_batch, method.large, seed, "bfloat16")
        count = job.steps * job.batch
        sentences = rows_of(balanced_sentences(), self.tokenizer, seed)
        rows = mixed(drawn(self.problems, seed, len(self.problems)), sentences, count)
        adapter = config_of(method, sizes.rank, job.steps)
        trained, history = fine_tune(load(self.biased), self.tokenizer, rows, job, adapter)
        return {"sets": self.probe.look(trained), "history": history}


def large_setup(model: str, name: str, data: Path, sizes: Sizes) -> LargeSetup:
    """Makes the biased model where it is not in the cache, which takes some minutes."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    of = partial(problems, tokenizer=tokenizer, longest=sizes.large_longest)
    probe = ColourProbe(
        probe_prefixes(tokenizer),
        colour_tokens(tokenizer),
        of(data / "gsm8k_test.jsonl", count=sizes.test),
        tokenizer.pad_token_id,
    )
    biased = biased_model(model, name, tokenizer, sizes, CACHE)
    return LargeSetup(model, biased, tokenizer, of(data / "gsm8k_train.jsonl", count=sizes.pool), probe, sizes)
