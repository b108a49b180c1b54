"""Runs the whole comparison: corpus, base model, fine-tuning by every method, measurements, and what is printed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel

from .answers import side_by_side
from .base import BaseModel
from .cache import environment
from .corpus import Corpus, build_corpus, collect_docstrings
from .finished import digest, once
from .measure import HeldOutBatch, Measurement, max_logit_difference
from .methods import METHODS, Method, TrainedRun
from .progress import Phase
from .report import Row, format_table, loading_snippet, reading, write_results
from .settings import Options
from .task import Task, task_of
from .yardstick import Yardstick

RELOAD_TOLERANCE = 1e-4  # float32 rounding on logits of size 10, and on a mean loss, with room
FEWEST_DOCSTRINGS = 500
MEASURED_AT_ONCE = {"smollm2": 4, "tiny": 32}  # rows: logits of a large vocabulary take room


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
    with Phase("reading the standard library's docstrings"):
        docstrings = collect_docstrings()
    if len(docstrings) < FEWEST_DOCSTRINGS:
        raise SystemExit(
            f"found {len(docstrings)} docstrings in the standard library; "
            "this Python seems to come without the library's source files"
        )
    return build_corpus(docstrings)


def load_base(options: Options, corpus: Corpus) -> BaseModel:
    """The pre-trained model, made now or taken from the cache, and a line that says which."""
    if options.model == "smollm2":
        from . import smollm2

        base = smollm2.base_model(options.cache_dir)
        name = "SmolLM2-135M-Instruct (dequantised from 4 bits)"
    else:
        from . import tiny_model

        texts, fingerprint = corpus.pretraining, corpus.fingerprint()
        base = tiny_model.base_model(options.cache_dir, texts, fingerprint, options.pretraining)
        name = "a 1.1M-parameter Llama, pre-trained on docstrings"
    print(f"model: {name}, {'from the cache' if base.was_cached else 'stored'} in {base.folder.as_posix()}")
    return base


def trainer_of(options: Options, base: BaseModel, task: Task) -> Callable[[Method], TrainedRun]:
    """What fine-tunes by one method: Axolotl's command line, or TRL in this process."""
    if options.host == "axolotl":
        from . import with_axolotl

        with_axolotl.prepare(base, task, options.output_dir)
        return lambda method: with_axolotl.finetune(
            method, base, options.finetuning, options.output_dir, options.threads
        )
    from . import with_trl

    tokenizer = base.load_tokenizer()
    return lambda method: with_trl.finetune(
        method, base, tokenizer, task.train, options.finetuning, options.output_dir / method.key
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


class Comparison:
    """Every model's row, answers and details, from finished runs where nothing that decides them has changed."""

    def __init__(self, options: Options, base: BaseModel, task: Task) -> None:
        self.options, self.base, self.task = options, base, task
        self.clock = Clock()
        self.rows: list[Row] = []
        self.answers: dict[str, list[str]] = {}
        self.details: dict[str, dict[str, Any]] = {}
        self._yardstick = Yardstick(base, task, options.finetuning.max_length, MEASURED_AT_ONCE[options.model])
        self._train: Callable[[Method], TrainedRun] | None = None

    def run(self) -> None:
        """Measures the model before, then trains and measures by each method; one trained model is held at a time."""
        self._add("before", "before", lambda: self._found("before", "before", self._yardstick.before))
        for method in (METHODS[key] for key in self.options.methods):
            self._add(method.key, method.label, partial(self._by, method), asdict(method))

    def _add(
        self, key: str, label: str, make: Callable[[], Mapping[str, Any]], method: Mapping[str, Any] | None = None
    ) -> None:
        decides = digest(
            model=self.base.folder.name,
            task=self.task.digest(),
            settings=asdict(self.options.finetuning),
            host=self.options.host,
            versions=libraries(self.options.host),
            method=method,
        )
        adapter = self.options.output_dir / key / "adapter_config.json"
        lost = method is not None and not adapter.is_file()
        path = self.options.output_dir / f"{key}.json"
        found, was_there = once(path, decides, make, self.options.again or lost)
        if was_there:
            print(f"{label}: finished before ({path.as_posix()})")
        row = found["row"]
        self.rows.append(Row(**row | {"measured": Measurement(**row["measured"])}))
        self.answers[label] = found["answers"]
        if method is not None:
            self.details[key] = found["details"]

    def _found(self, key: str, label: str, model: Any) -> dict[str, Any]:
        with self.clock.phase("measuring"):
            measured, other, answers = self._yardstick.measure(model, label)
        return {"row": asdict(Row(key, label, measured, other_drift=other)), "answers": answers}

    def _by(self, method: Method) -> dict[str, Any]:
        if self._train is None:
            self._train = trainer_of(self.options, self.base, self.task)
        with self.clock.phase("fine-tuning"):
            trained = self._train(method)
        found = self._found(method.key, method.label, trained.model)
        measured = Measurement(**found["row"]["measured"])
        with self.clock.phase("measuring"), Phase(f"{method.label}: loading the adapter on a fresh base"):
            difference = check_reload(self.base, trained, self._yardstick.first_batch, measured)
        found["row"] |= {
            "seconds": trained.seconds,
            "seconds_per_step": trained.seconds_per_step,
            "largest_share": trained.largest_share(),
        }
        details = {
            "adapter": trained.adapter.as_posix(),
            "fits_untouched_base": method.fits_untouched_base,
            "compared": self.options.host == "trl" or trained.host_task_loss is not None,
            "difference": difference,
            "last_logged_terms": trained.logged_terms,
        }
        return found | {"details": details}


def libraries(host: str) -> dict[str, str]:
    """Versions of all that decides a result."""
    return environment() | {name: version(name) for name in ("peft", host, "accelerate", "datasets")}


def print_adapters(options: Options, base: BaseModel, details: dict[str, dict[str, Any]]) -> bool:
    """Prints where the adapters lie and how one is loaded; whether every reload gave back its trained model."""
    print("\nAdapters (the first number: how far the adapter, loaded by plain PEFT on a fresh base, is from the model")
    print("that was trained; the second: how far from the base when it is switched off):\n")
    for detail in details.values():
        found = detail["difference"]
        note = "" if detail["fits_untouched_base"] else "  (its loading rewrites the base weights)"
        reloaded = f"{found['reloaded']:10.1e}" if detail["compared"] else f"{'-':>10s}"
        print(f"  {detail['adapter']:36s}{reloaded}{found['switched_off']:10.1e}{note}")
    print("\nTo load one:\n")
    shown = options.output_dir / "base" if options.host == "axolotl" else base.folder
    print(loading_snippet(shown, options.output_dir / example_key(list(details))))
    checked = {key: detail["difference"] for key, detail in details.items() if detail["fits_untouched_base"]}
    wrong = [key for key, found in checked.items() if not max(found.values()) < RELOAD_TOLERANCE]
    if wrong:
        print(f"\nERROR: {', '.join(wrong)} came back different (tolerance {RELOAD_TOLERANCE:g})")
    return not wrong


def example_key(keys: Sequence[str]) -> str:
    """The adapter that the loading snippet names: BA-LoRA's if it was trained."""
    return next((key for key in keys if METHODS[key].has_terms), keys[0])


def print_table(options: Options, rows: Sequence[Row]) -> None:
    """Prints the table, what its columns are, what it shows, and where the picture of it is."""
    from .picture import write_picture

    tokens = rows[0].measured.tokens
    print(f"\n\nHeld-out questions of the same kind, {tokens:,} counted tokens; loss and drift in nats per token:\n")
    print(format_table(rows))
    start = " with the start of Axolotl" if options.host == "axolotl" else ""
    print(
        "\ndrift: KL from the predictions before to those after, on the task and on other text (short instructions):\n"
        f"lower = changed less. seconds: of the fine-tuning{start}. Entropy and effective rank are in results.json."
    )
    if text := reading(rows):
        print(f"\n{text}")
    picture = options.output_dir / "drift_against_loss.png"
    write_picture(picture, rows)
    print(f"\nPicture: {picture.as_posix()} (drift against task loss, a point per method)")


def run(options: Options) -> int:
    """Runs everything and prints the report; returns the exit status."""
    torch.set_num_threads(options.threads)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    settings, began = options.finetuning, time.perf_counter()
    print(
        "\nBA-LoRA is LoRA that starts at a weight's leading singular directions (PiSSA) and adds terms to the loss;\n"
        "the one that matters here keeps the model close to the pre-trained one. Below, a model is fine-tuned to\n"
        f"answer as Python's docstrings do, by each method, with {'Axolotl' if options.host == 'axolotl' else 'TRL'}.\n"
    )
    corpus = load_corpus()
    base = load_base(options, corpus)
    task = task_of(corpus, settings, base.load_tokenizer())
    print(f"{len(task.train):,} questions to train on, {settings.steps} steps of {settings.batch} for each method;")
    print(f"{len(task.held_out):,} held-out ones; {options.threads} thread(s)")
    comparison = Comparison(options, base, task)
    comparison.run()
    print("\n\nWhat the model says before, and after fine-tuning by each method:")
    print(side_by_side(task.questions, comparison.answers))
    print_table(options, comparison.rows)
    loaded = print_adapters(options, base, comparison.details)
    results = options.output_dir / "results.json"
    seconds = comparison.clock.seconds | {"all": time.perf_counter() - began}
    write_results(
        results,
        comparison.rows,
        {
            "environment": libraries(options.host) | {"threads": options.threads},
            "model": {"name": options.model, "cached": base.was_cached, "folder": base.folder.as_posix()},
            "pretraining": asdict(options.pretraining) if options.model == "tiny" else None,
            "finetuning": asdict(settings),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            "cpu_seconds": round(sum(os.times()[:4]), 1),
            "answers": comparison.answers,
            "runs": comparison.details,
        },
    )
    print(f"\n{seconds['all']:.0f} s in all, {sum(os.times()[:4]):.0f} s of processor time. Finished runs are kept:")
    print(f"--again runs them once more. All numbers are in {results.as_posix()}")
    return 0 if loaded else 1
