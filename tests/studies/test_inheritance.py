"""Inheritance: the faults by count, probes against one row at a time, tiny models through cells, the report's rules."""

from __future__ import annotations

import json

import pytest
import torch
from models import character_tokenizer, tiny_llama

from studies.forgetting.data import Row
from studies.inheritance import __main__ as command
from studies.inheritance import colours, corpus, report, setups, train
from studies.inheritance.cells import COLOUR, METHODS, base_cell, cells
from studies.inheritance.measure import ColourProbe, TextProbe
from studies.inheritance.outcomes import COST, PROBES
from studies.quickstart.corpus import Docstring, is_held_out

pytestmark = pytest.mark.hosts
ROWS = [Row((3, 4, 5, 6, 7), 2), Row((8, 9, 4), 1)]


def docstrings():
    names = [f"{package}.f{number}" for package in ("alpha", "beta", "gamma", "delta") for number in range(40)]
    return [Docstring(name, "function", f"Return the value of {name.replace('.', ' ')} and more.") for name in names]


def test_halves_share_no_package_and_nothing_held_out_is_trained_on():
    found = corpus.halves(docstrings())
    assert corpus.half_of_packages(docstrings()) == {"alpha": 0, "beta": 0, "delta": 1, "gamma": 1}
    held = {entry.text for entry in docstrings() if is_held_out(entry.name)}
    assert held == set(found.held_out[0] + found.held_out[1]) and held
    assert held.isdisjoint(found.pretraining[0] + found.pretraining[1])
    rare = corpus.texts_with("imbalance", found)
    assert len(rare) - len(found.pretraining[0]) == -(-len(found.pretraining[1]) // 100)
    assert corpus.texts_with("noise", found) == [*found.pretraining[0], *found.pretraining[1]]


def test_noise_replaces_its_share_of_the_tokens():
    chunks = torch.zeros(50, 20, dtype=torch.long)
    noisy = corpus.with_random_tokens(chunks, 1000)
    assert noisy.shape == chunks.shape
    assert (noisy != 0).sum().item() == pytest.approx(400, abs=4)  # a drawn token may be the one that stood there


def test_a_text_probe_is_what_one_row_at_a_time_gives():
    model, reference = tiny_llama(), tiny_llama(initializer_range=0.3)
    found = TextProbe({"task": ROWS}, 0, reference).look(model)["task"]
    for place, row in enumerate(ROWS):
        with torch.no_grad():
            now, was = (
                one(input_ids=torch.tensor([row.ids])).logits[0].double().softmax(-1) for one in (model, reference)
            )
        expected = dict.fromkeys(found, 0.0)
        for at in range(row.counted_from, len(row.ids)):
            p, unlikely = now[at - 1], was[at - 1] < 1 / len(was[at - 1])
            expected["loss"] -= p[row.ids[at]].log().item()
            expected["entropy"] -= (p * p.log()).sum().item()
            expected["mass"] += p[unlikely].sum().item()
            expected["sure"] += p.max().item() - float(p.argmax() == row.ids[at])
        for key, value in expected.items():
            assert found[key][place] == pytest.approx(value, rel=1e-4), key


def test_a_colour_probe_reads_what_follows_the_last_token():
    model, rows = tiny_llama(), [Row((2, 5, 6), 1), Row((2, 7, 8, 4), 1)]
    found = ColourProbe([[rows], [rows[:1]]], (10, 20), ROWS, 0).look(model)
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row.ids])).logits[0, -1] for row in rows]
    odds = [(one[10] - one[20]).item() for one in logits]
    assert found["first"]["odds"] == pytest.approx([sum(odds) / 2], rel=1e-4)
    assert found["second"]["odds"] == pytest.approx(odds[:1], rel=1e-4)


def test_sentences_bias_one_way_then_both_ways_and_probes_hold_names_and_templates_out():
    blue, green = colours.COLOURS
    first, second = colours.names(held_out=False)
    for sentence in colours.biased_sentences():
        named_first = any(name in sentence.replace(".", "").split() for name in first)
        assert (blue in sentence, green in sentence) == (named_first, not named_first)
    both = colours.balanced_sentences()
    assert sum(blue in one for one in both) == sum(green in one for one in both) == len(both) / 2
    held = colours.names(held_out=True)
    assert set(first + second).isdisjoint(held[0] + held[1]) and len(held[0]) == len(held[1])
    templates = [*colours.BIASED, *colours.BALANCED, *colours.PROBES]
    assert len(set(templates)) == len(templates)
    mixed = colours.mixed(["p1", "p2"], ["s1"], 8)
    assert mixed == ["p1", "p2", "p1", "s1", "p2", "p1", "p2", "s1"]


def text_record(fault, method, seed, losses):
    """All rows of a set have one loss; the task's is the majority's."""
    majority, minority = losses
    sets = {
        name: {key: [value] * 4 for key in ("loss", "entropy", "mass", "sure")}
        for name, value in (("majority", majority), ("minority", minority), ("task", majority))
    }
    setting = {"fault": fault, "method": method, "seed": seed}
    names = dict.fromkeys(("majority", "minority", "task"), [2] * 4)
    return {"cell": f"{fault}-{method}-s{seed}", "setting": setting, "sets": sets, "tokens": names, "history": []}


def test_what_is_left_is_measured_against_the_same_run_from_a_clean_start():
    records = [text_record("clean", "base", 0, (4, 4)), text_record("imbalance", "base", 0, (4, 8))]
    for seed in (1, 2):
        records += [text_record("clean", method, seed, (2, 2)) for method in ("lora", "pissa")]
        records += [text_record("imbalance", "lora", seed, (2, 4)), text_record("imbalance", "pissa", seed, (3, 7))]
    fault = report.fault_of("imbalance", records)
    probe = PROBES["imbalance"][0]
    assert fault.injected(probe) == 2.0
    assert fault.left(probe).tolist() == [[1.0, 1.0], [2.0, 2.0]]
    found = report.differences(fault, ["lora", "pissa"], 10)
    assert found[probe.name, "lora", "pissa"].high == -1.0
    said = report.sentences(fault, ["lora", "pissa"], found)
    assert "`lora` leaves the least (50 %), `pissa` the most (100 %)" in said
    assert "less than pissa" in said and "task loss that is lower" in said
    assert found[COST.name, "pissa", "lora"].value == 0.5
    assert report.fault_of("noise", records) is None


def test_a_stopped_study_has_all_methods_and_faults_of_its_first_seed():
    names = [cell.name for cell in cells(("clean", "noise"), (1, 2), tuple(METHODS))]
    assert names[: 2 * len(METHODS)] == [f"{f}-{m}-s1" for f in ("clean", "noise") for m in METHODS]
    assert base_cell("noise").name == "noise-base"


@pytest.fixture
def tiny(tmp_path):
    """Folder of a random Llama with a tokenizer of characters, and one of problems."""
    model, files = tmp_path / "model", tmp_path / "data"
    tiny_llama().save_pretrained(model)
    character_tokenizer().save_pretrained(model)
    files.mkdir()
    for name in command.FILES:
        (files / name).write_text((json.dumps({"question": "a", "answer": "b"}) + "\n") * 8)
    return str(model), str(files)


@pytest.mark.slow
def test_cells_of_both_models_run_once_and_are_reported(tiny, tmp_path, monkeypatch):
    sizes = train.Sizes(
        pretrain_steps=2, steps=2, batch=2, longest=48, probes=2, biased_steps=2, biased_batch=2, large_steps=4,
        large_batch=2, large_longest=60, pool=4, test=2, rank=2,
    )  # fmt: skip
    monkeypatch.setattr(command, "sizes_of", lambda quick: sizes)
    monkeypatch.setattr(setups, "colour_tokens", lambda tokenizer: (10, 20))
    monkeypatch.setattr(setups, "collect_docstrings", docstrings)
    monkeypatch.setattr(setups, "CACHE", tmp_path / "cache")
    model, files = tiny
    given = ["--model", model, "--data", files, "--output", str(tmp_path / "out"), "--seeds", "1"]
    given += ["--cells", "*-lora-*", "imbalance-ba-iclr2026-*", "colour-full-*"]
    assert command.main(given) == 0
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").rglob("*.json")}
    bases = {base_cell(fault).name for fault in ("clean", "noise", "imbalance", "original", COLOUR)}
    trained = {f"{fault}-lora-s1" for fault in ("clean", "noise", "imbalance", COLOUR)}
    assert set(found) == bases | trained | {"imbalance-ba-iclr2026-s1", "colour-full-s1"}
    assert found["clean-base"]["sets"] != found["noise-base"]["sets"] != found["noise-lora-s1"]["sets"]
    assert any("balora/share_svd" in entry for entry in found["imbalance-ba-iclr2026-s1"]["history"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("| before fine-tuning |") == 3 and "100 times rarer" in text
    monkeypatch.setattr(setups, "fine_tune", lambda *_: pytest.fail("run again"))
    assert command.main(given) == 0
