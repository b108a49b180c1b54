"""Runs the whole comparison: corpus, base model, fine-tuning by every method, measurements, table, reload check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from .cache import environment
from .corpus import Corpus, build_corpus, collect_docstrings
from .measure import HeldOutBatch, Measurement, held_out_batches, max_logit_difference, measure, reference_logits
from .methods import METHODS, Method, TrainedRun
from .report import Row, format_table, loading_snippet, reading, write_results
from .settings import Options
from .tiny_model import BaseModel, base_model

RELOAD_TOLERANCE = 1e-4  # float32 rounding on logits of size 10, and on a mean loss, with room
FEWEST_DOCSTRINGS = 500


class Clock:
    """Wall-clock seconds per named phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def load_corpus() -> Corpus:
    """The corpus of this interpreter; refuses installations that ship the library without its sources."""
    docstrings = collect_docstrings(progress=True)
    if len(docstrings) < FEWEST_DOCSTRINGS:
        raise SystemExit(
            f"found {len(docstrings)} docstrings in the standard library; "
            "this Python seems to come without the library's source files"
        )
    corpus = build_corpus(docstrings)
    print(
        f"{len(docstrings):,} docstrings: {len(corpus.pretraining):,} to pre-train on, {len(corpus.train):,} of them "
        f"with a training pair; {len(corpus.held_out):,} held-out pairs from the rest"
    )
    return corpus


def load_base(options: Options, corpus: Corpus) -> BaseModel:
    """The pre-trained model, trained now or taken from the cache, and a line that says which."""
    base = base_model(options.cache_dir, corpus.pretraining, corpus.fingerprint(), options.pretraining)
    print(f"pre-trained model {'taken from the cache' if base.was_cached else 'stored'} in {base.folder.as_posix()}")
    return base


def trainer_of(options: Options, base: BaseModel, corpus: Corpus) -> Callable[[Method], TrainedRun]:
    """What fine-tunes by one method: Axolotl's command line, or TRL in this process."""
    if options.host == "axolotl":
        from . import with_axolotl

        with_axolotl.prepare(base, corpus, options.output_dir)
        return lambda method: with_axolotl.finetune(
            method, base, options.finetuning, options.output_dir, options.threads
        )
    from . import with_trl

    tokenizer = base.load_tokenizer()
    return lambda method: with_trl.finetune(
        method, base, tokenizer, corpus.train, options.finetuning, options.output_dir / method.key
    )


@torch.no_grad()
def check_reload(
    base: BaseModel, trained: TrainedRun, batch: HeldOutBatch, measured: Measurement | None = None
) -> dict[str, float]:
    """Loads the saved adapter with stock PEFT on a fresh base and compares.

    `reloaded`: largest logit difference to the trained model on one batch or, where another process trained it and
    said so, the difference of `measured`'s task loss to what that process measured on its own model.
    `switched_off`: largest logit difference to the base with the adapter off: whether loading left the base alone.
    """
    fresh = base.load_model()
    reloaded = PeftModel.from_pretrained(base.load_model(), str(trained.adapter))
    found = {}
    if trained.host_task_loss is not None and measured is not None:
        found["reloaded"] = abs(trained.host_task_loss - measured.task_loss)
    else:
        found["reloaded"] = max_logit_difference(trained.model, reloaded, batch)
    with reloaded.disable_adapter():
        found["switched_off"] = max_logit_difference(fresh, reloaded, batch)
    return found


def compare(
    options: Options, base: BaseModel, corpus: Corpus, clock: Clock
) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """(table rows, details of every run by method key); one model is in memory at a time beside the reference."""
    batches = held_out_batches(corpus.held_out, base.load_tokenizer(), options.finetuning.max_length)
    with clock.phase("measuring"):
        before = base.load_model()
        reference: Sequence[Tensor] = reference_logits(before, batches)
        rows = [Row("before", "pre-trained (before)", measure(before, batches, reference))]
    train = trainer_of(options, base, corpus)
    details: dict[str, dict[str, Any]] = {}
    for method in (METHODS[key] for key in options.methods):
        with clock.phase("fine-tuning"):
            trained = train(method)
        with clock.phase("measuring"):
            measured = measure(trained.model, batches, reference)
            rows.append(Row(method.key, method.label, measured, trained.seconds, trained.largest_share()))
            details[method.key] = {
                "adapter": trained.adapter.as_posix(),
                "fits_untouched_base": method.fits_untouched_base,
                "difference": check_reload(base, trained, batches[0], measured),
                "last_logged_terms": trained.logged_terms,
            }
    return rows, details


def print_adapters(options: Options, base: BaseModel, details: dict[str, dict[str, Any]]) -> bool:
    """Prints where the adapters lie and how they load; whether every reload gave back its trained model."""
    print(f"\nAdapters, one folder each, in {options.output_dir.as_posix()}. Loaded with plain PEFT on a fresh base:")
    if options.host == "trl":
        print("the largest logit difference to the trained model, and, with the adapter switched off, to the base:\n")
    else:
        print(
            "for BA-LoRA the difference in held-out task loss to what Axolotl measured on the model it had trained,\n"
            "and for all, with the adapter switched off, the largest logit difference to the base:\n"
        )
    print(f"  {'':18s}{'reloaded':>10s}{'off':>10s}")
    for key, detail in details.items():
        found = detail["difference"]
        note = "" if detail["fits_untouched_base"] else "  (its loading rewrites the base weights)"
        compared = options.host == "trl" or METHODS[key].is_ba_lora
        reloaded = f"{found['reloaded']:10.1e}" if compared else f"{'-':>10s}"
        print(f"  {key:18s}{reloaded}{found['switched_off']:10.1e}{note}")
    print("\nTo load one:\n")
    shown = options.output_dir / "base" if options.host == "axolotl" else base.folder
    print(loading_snippet(shown, options.output_dir / example_key(list(details))))
    checked = {key: detail["difference"] for key, detail in details.items() if detail["fits_untouched_base"]}
    wrong = [key for key, found in checked.items() if not max(found.values()) < RELOAD_TOLERANCE]
    if wrong:
        print(f"\nERROR: {', '.join(wrong)} came back different (tolerance {RELOAD_TOLERANCE:g})")
    return not wrong


def example_key(keys: Sequence[str]) -> str:
    """The adapter that the loading snippet names: BA-LoRA at the paper's weights if it was trained."""
    return next((key for key in keys if METHODS[key].is_ba_lora), keys[0])


def run(options: Options) -> int:
    """Runs everything and prints the report; returns the exit status."""
    clock = Clock()
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    print(
        "BA-LoRA is LoRA that starts at a weight's leading singular directions (PiSSA) and adds three terms to the\n"
        "loss: stay consistent with the pre-trained model, keep outputs diverse, concentrate their singular values.\n"
        "Here a tiny model is pre-trained, then fine-tuned by LoRA, PiSSA and BA-LoRA on the same questions,\n"
        f"with {'Axolotl' if options.host == 'axolotl' else 'TRL'}.\n"
    )
    with clock.phase("corpus"):
        corpus = load_corpus()
    with clock.phase("pre-training"):
        base = load_base(options, corpus)
    rows, details = compare(options, base, corpus, clock)
    print(f"\nHeld-out pairs, {rows[0].measured.tokens:,} counted tokens; all but the rank in nats per token:\n")
    print(format_table(rows))
    print(
        "\ndrift: KL from the pre-trained model's predictions to the fine-tuned ones, lower = closer to it; entropy,\n"
        "effective rank: higher = more diverse; seconds: of this run, on a machine that may do other things too"
        + (" (the start-up of Axolotl's process included)" if options.host == "axolotl" else "")
    )
    if text := reading(rows):
        print(f"\n{text}")
    loaded = print_adapters(options, base, details)
    results = options.output_dir / "results.json"
    libraries = {name: version(name) for name in ("peft", options.host, "accelerate", "datasets")}
    write_results(
        results,
        rows,
        {
            "environment": environment() | libraries | {"threads": options.threads},
            "pretraining": asdict(options.pretraining) | {"cached": base.was_cached, "folder": base.folder.as_posix()},
            "finetuning": asdict(options.finetuning),
            "seconds": {name: round(seconds, 1) for name, seconds in clock.seconds.items()},
            "runs": details,
        },
    )
    phases = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.seconds.items())
    print(f"\n{phases} with {options.threads} thread(s); all numbers are in {results.as_posix()}")
    return 0 if loaded else 1
