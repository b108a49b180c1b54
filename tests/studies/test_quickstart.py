"""Tests of the quickstart: corpus without leaks, measurements against brute force, cache keys and atomic writes."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from studies.quickstart import cache, corpus, measure, report, settings, tiny_model
from studies.quickstart.corpus import Docstring, Instruction

TINY = settings.PretrainingSettings(
    steps=3, vocabulary=300, hidden=16, intermediate=32, layers=2, heads=2, positions=256, chunk=16, batch=4
)
PAIRS = [
    Instruction("a.sort", "What does `a.sort` do?\n", "Sort the items in place and return nothing."),
    Instruction("a.Map", "What is `a.Map`?\n", "Maps names to values."),
    Instruction("a.join", "What does `a.join` do?\n", "Join the parts with a separator between each of them."),
]
TEXTS = [f"{pair.prompt}{pair.completion} Number {number}." for number in range(20) for pair in PAIRS]


def write_library(root: Path, names: list[str]) -> None:
    """A miniature standard library; the files `names` are created first."""
    sources = {
        "zoo.py": '"""All animals."""\nclass Cat:\n    """A small animal with claws."""\n'
        '    def purr(self):\n        """Make a low noise for a while."""\n'
        "        def inner():\n            '''Never collected.'''\n",
        "posixpath.py": 'def join(a, b):\n    """Join two parts of a path."""\n',
        "again.py": 'if 1:\n    def join(a, b):\n        """Join  two parts\n  of a path."""\n'
        'else:\n    def split(a):\n        """Split a path into parts."""\n',
        "broken.py": "def f(:\n",
        "surrogate.py": '"""Lone \\ud800 surrogate in the text."""\n',
        "package/__init__.py": '"""A package."""\n',
        "package/test/test_it.py": '"""Tests of the package."""\n',
        "site-packages/other.py": '"""Not from the library."""\n',
        "not-a-module.py": '"""Cannot be imported."""\n',
    }
    for name in [*names, *(sources.keys() - set(names))]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sources[name])


@pytest.fixture(scope="module")
def library() -> list[Docstring]:
    """The docstrings of the real standard library."""
    return corpus.collect_docstrings()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tiny_model.BaseModel:
    """A tiny base model trained for a few steps."""
    return tiny_model.base_model(tmp_path_factory.mktemp("cache"), TEXTS, "digest", TINY, progress=False)


def test_docstrings_of_a_library(tmp_path: Path) -> None:
    """Names, kinds and texts are as in the source; tests, duplicates, broken files and surrogates are left out."""
    write_library(tmp_path, [])
    found = corpus.collect_docstrings(tmp_path)
    assert [(entry.name, entry.kind, entry.text) for entry in found] == [
        ("again.join", "function", "Join  two parts\nof a path."),
        ("again.split", "function", "Split a path into parts."),
        ("package", "module", "A package."),
        ("zoo", "module", "All animals."),
        ("zoo.Cat", "class", "A small animal with claws."),
        ("zoo.Cat.purr", "function", "Make a low noise for a while."),
    ]
    assert ("os.path", tmp_path / "posixpath.py") in corpus.source_files(tmp_path)


def test_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    """Files created in another order give the same docstrings in the same order."""
    write_library(tmp_path / "one", ["zoo.py", "again.py"])
    write_library(tmp_path / "two", ["again.py", "package/__init__.py", "zoo.py"])
    assert corpus.collect_docstrings(tmp_path / "one") == corpus.collect_docstrings(tmp_path / "two")


def test_standard_library_is_collected_without_importing_it(library: list[Docstring]) -> None:
    """The real library gives thousands of docstrings and is not imported on the way."""
    assert len(library) > 3000
    assert "antigravity" not in sys.modules
    names = [entry.name for entry in library]
    assert len(set(names)) == len(names)
    assert "os.path.join" in names


def test_held_out_pairs_do_not_leak(library: list[Docstring]) -> None:
    """No held-out name or answer occurs in pre-training text, and none in the training pairs."""
    built = corpus.build_corpus(library)
    assert len(built.train) > 1000 and len(built.held_out) > 100
    text = "\n".join(corpus.collapse(entry) for entry in built.pretraining)
    train_names = {pair.name for pair in built.train}
    train_completions = {pair.completion for pair in built.train}
    full_texts = {entry.name: corpus.collapse(entry.text) for entry in library}
    for pair in built.held_out:
        assert corpus.is_held_out(pair.name) and pair.name not in train_names
        assert pair.completion not in train_completions
        assert pair.name not in text and pair.completion not in text
        assert full_texts[pair.name] not in text
    assert not any(corpus.is_held_out(pair.name) for pair in built.train)
    assert corpus.build_corpus(library) == built
    assert corpus.build_corpus(library).fingerprint() == built.fingerprint()


def test_shared_first_paragraph_is_not_held_out() -> None:
    """A held-out pair whose answer also opens a training docstring is dropped."""
    out = next(f"m.f{number}" for number in range(1000) if corpus.is_held_out(f"m.f{number}"))
    kept = next(f"m.f{number}" for number in range(1000) if not corpus.is_held_out(f"m.f{number}"))
    same = "Return the number of items in the queue."
    entries = [Docstring(kept, "function", same + "\n\nNot reliable."), Docstring(out, "function", same)]
    assert corpus.build_corpus(entries).held_out == ()
    alone = corpus.build_corpus(entries[1:])
    assert alone.pretraining == () and [pair.name for pair in alone.held_out] == [out]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the sum of\n  all items.\n\nMore.", "Return the sum of all items."),
        ("f(a, b) -> the sum of both numbers", None),
        ("Too short.", None),
        ("word " * 100, None),
        (">>> print(1 + 1 + 1 + 1 + 1)", None),
    ],
)
def test_first_paragraph(text: str, expected: str | None) -> None:
    """Only bounded prose makes an answer."""
    assert corpus.first_paragraph(text) == expected


def test_prompts() -> None:
    """Functions do, classes are; private names and modules get no question."""
    text = "Return the sum of all items."
    assert corpus.instruction(Docstring("a.f", "function", text)).prompt == "What does `a.f` do?\n"
    assert corpus.instruction(Docstring("a.F", "class", text)).prompt == "What is `a.F`?\n"
    assert corpus.instruction(Docstring("a._f", "function", text)) is None
    assert corpus.instruction(Docstring("a", "module", text)) is None


def test_token_quantities_match_brute_force() -> None:
    """Loss, divergence and entropy agree with sums written out over the vocabulary."""
    torch.manual_seed(0)
    before, after = (torch.randn(5, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    targets = torch.randint(7, (5,))
    losses = measure.token_losses(after, targets)
    divergences = measure.token_divergences(before, after)
    entropies = measure.token_entropies(after)
    for row in range(5):
        p = [math.exp(value) for value in before[row].tolist()]
        q = [math.exp(value) for value in after[row].tolist()]
        assert losses[row].item() == pytest.approx(-math.log(q[targets[row]]))
        assert divergences[row].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        assert entropies[row].item() == pytest.approx(-sum(b * math.log(b) for b in q))


def test_effective_rank() -> None:
    """Equal directions count fully, a single one counts as 1, and unequal ones follow the definition."""
    assert measure.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert measure.effective_rank(torch.outer(torch.arange(1.0, 5), torch.ones(3))) == pytest.approx(1, abs=1e-6)
    shares = [0.5, 0.3, 0.2]
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert measure.effective_rank(4 * rotation @ torch.diag(torch.tensor(shares).double())) == pytest.approx(expected)


def test_measure_matches_one_sequence_at_a_time(base: tiny_model.BaseModel) -> None:
    """Padding and batching change nothing: every mean runs over the completion tokens of all pairs."""
    tokenizer = base.load_tokenizer()
    before, after = base.load_model(), base.load_model()
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.mul_(1.5)
    batches = measure.held_out_batches(PAIRS, tokenizer, batch_size=2)
    found = measure.measure(after, batches, measure.reference_logits(before, batches))
    losses, drifts, entropies, logits = [], [], [], []
    for pair in PAIRS:
        ids, prompt = measure.encode(pair, tokenizer, 256)
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:prompt]) == pair.prompt
        with torch.no_grad():
            p, q = (model(input_ids=torch.tensor([ids])).logits[0].double() for model in (before, after))
        for place in range(prompt, len(ids)):
            log_p, log_q = p[place - 1].log_softmax(-1), q[place - 1].log_softmax(-1)
            losses.append(-log_q[ids[place]].item())
            drifts.append((log_p.exp() * (log_p - log_q)).sum().item())
            entropies.append(-(log_q.exp() * log_q).sum().item())
            logits.append(q[place - 1])
    assert found.tokens == len(losses)
    assert found.task_loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found.drift == pytest.approx(sum(drifts) / len(drifts), abs=1e-5) and found.drift > 1e-3
    assert found.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    assert found.effective_rank == pytest.approx(measure.effective_rank(torch.stack(logits)), abs=1e-3)


def test_measure_leaves_the_model_as_it_was(base: tiny_model.BaseModel) -> None:
    """A model drifts by nothing from itself and keeps its training mode."""
    model = base.load_model().train()
    batches = measure.held_out_batches(PAIRS, base.load_tokenizer())
    assert measure.measure(model, batches, measure.reference_logits(model, batches)).drift == 0
    assert model.training


def test_pretraining_is_reproducible_and_learns(base: tiny_model.BaseModel) -> None:
    """The same settings give the same weights, and more steps a lower loss."""
    tokenizer = tiny_model.train_tokenizer(TEXTS, TINY.vocabulary)
    assert tokenizer.get_vocab() == base.load_tokenizer().get_vocab()
    chunks = tiny_model.pack(TEXTS, tokenizer, TINY.chunk)
    assert chunks.shape[1] == TINY.chunk
    again = tiny_model.build_model(TINY, tokenizer)
    short = tiny_model.pretrain(again, chunks, TINY, progress=False)
    for name, weight in base.load_model().named_parameters():
        torch.testing.assert_close(weight, again.get_parameter(name))
    longer = tiny_model.pretrain(tiny_model.build_model(TINY, tokenizer), chunks, replace(TINY, steps=60), False)
    assert longer < short


def test_cache_key() -> None:
    """The key ignores the order of its parts and changes with each of them."""
    versions = {"python": "3.11.1", "torch": "2.0"}
    key = cache.cache_key({"steps": 3, "seed": 0}, versions)
    assert key == cache.cache_key({"seed": 0, "steps": 3}, dict(reversed(versions.items())))
    others = [
        cache.cache_key({"steps": 4, "seed": 0}, versions),
        cache.cache_key({"steps": 3, "seed": 0}, versions | {"python": "3.12.0"}),
        cache.cache_key({"steps": 3, "seed": 0, "corpus": "x"}, versions),
    ]
    assert len({key, *others}) == 4
    assert set(cache.environment()) == {"python", *cache.KEYED_LIBRARIES}


def test_cached_folder_is_written_once(tmp_path: Path) -> None:
    """The second call finds the first one's folder; an interrupted one leaves nothing behind."""
    calls = []

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    def write(folder: Path) -> None:
        calls.append(folder)
        (folder / "content").write_text("done")

    with pytest.raises(KeyboardInterrupt):
        cache.cached_folder(tmp_path, {"steps": 1}, fail)
    assert list(tmp_path.iterdir()) == []
    folder, was_there = cache.cached_folder(tmp_path, {"steps": 1}, write)
    assert not was_there and calls[0] != folder and (folder / "content").read_text() == "done"
    assert cache.cached_folder(tmp_path, {"steps": 1}, write) == (folder, True)
    assert len(calls) == 1 and list(tmp_path.iterdir()) == [folder]


def test_atomic_write_keeps_what_another_process_finished(tmp_path: Path) -> None:
    """If the target appears while it is being written, it stays and the temporary folder goes."""
    target = tmp_path / "key"

    def write(folder: Path) -> None:
        target.mkdir()
        (target / "content").write_text("theirs")
        (folder / "content").write_text("ours")

    cache.write_atomically(target, write)
    assert (target / "content").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_options() -> None:
    """Methods come in the table's order, and nonsense is refused."""
    options = settings.parse_options(["--methods", "pissa", "lora", "--steps", "5", "--pretrain-steps", "7"])
    assert options.methods == ("lora", "pissa")
    assert (options.finetuning.steps, options.pretraining.steps) == (5, 7)
    assert (options.model, options.finetuning.train_pairs) == ("smollm2", 20)
    real = settings.parse_options([])
    assert (real.host, real.finetuning) == ("axolotl", settings.REAL)
    assert real.methods == ("lora", "pissa-delta", "ba-lora")
    assert (real.finetuning.rate_of("pissa"), real.finetuning.rate_of(True)) == (1e-4, 4e-4)
    tiny = settings.parse_options(["--tiny", "--host", "trl"])
    assert (tiny.finetuning, tiny.threads) == (settings.FinetuningSettings(), 1)
    assert {"lora", "pissa", "ba-lora-paper"} <= set(tiny.methods)
    assert tiny.output_dir == Path("outputs/quickstart-tiny-trl")
    for wrong in (["--steps", "0"], ["--methods", "full"]):
        with pytest.raises(SystemExit):
            settings.parse_options(wrong)


def test_table_and_reading() -> None:
    """Columns line up, and the reading states the measured differences."""
    one = measure.Measurement(4.5, 0.0, 3.0, 20.0, 100)
    rows = [report.Row("before", "pre-trained (before)", one)]
    assert report.reading(rows) == ""
    rows += [
        report.Row("pissa", "PiSSA", replace(one, task_loss=4.1, drift=0.5), 9.0),
        report.Row("ba-lora-paper", "BA-LoRA", replace(one, task_loss=4.102, drift=0.4999), 12.0, 0.0003),
    ]
    lines = report.format_table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    text = corpus.collapse(report.reading(rows))
    assert "by +0.002 in task loss and +0.000 in drift (strongest term: 0.0003 of the task's gradient)" in text


def test_counted_tokens_are_those_of_trl(base: tiny_model.BaseModel, tmp_path: Path) -> None:
    """TRL's own preparation of the pairs yields the same ids and the same counted tokens."""
    from datasets import Dataset
    from trl import SFTTrainer

    from studies.quickstart import methods, with_trl

    assert tuple(methods.METHODS) == settings.METHOD_KEYS
    tokenizer = base.load_tokenizer()
    options = settings.FinetuningSettings(steps=2, batch=2)
    trainer = SFTTrainer(
        model=base.load_model(),
        args=with_trl.trainer_arguments(options, tmp_path),
        train_dataset=Dataset.from_list([pair.as_row() for pair in PAIRS]),
        processing_class=tokenizer,
    )
    for row, pair in zip(trainer.train_dataset, PAIRS, strict=True):
        ids, prompt = measure.encode(pair, tokenizer, options.max_length)
        assert row["input_ids"] == ids
        assert row["labels"] == [-100] * prompt + ids[prompt:]


@pytest.mark.parametrize("key", settings.METHOD_KEYS)
def test_saved_adapter_gives_back_the_model(key: str, base: tiny_model.BaseModel, tmp_path: Path) -> None:
    """Plain PEFT loads every adapter; all but stock PiSSA's leave the base weights alone."""
    from studies.quickstart import methods, run, with_trl

    tokenizer = base.load_tokenizer()
    options = settings.FinetuningSettings(steps=2, batch=2, learning_rate=1e-2)
    method = methods.METHODS[key]
    trained = with_trl.finetune(method, base, tokenizer, PAIRS, options, tmp_path / key, progress=False)
    batch = measure.held_out_batches(PAIRS, tokenizer)[0]
    found = run.check_reload(base, trained, batch)
    assert found["reloaded"] < run.RELOAD_TOLERANCE
    assert (found["switched_off"] < run.RELOAD_TOLERANCE) == method.fits_untouched_base
    assert measure.max_logit_difference(trained.model, base.load_model(), batch) > 1e-3
    assert (trained.largest_share() is not None) == method.has_terms
