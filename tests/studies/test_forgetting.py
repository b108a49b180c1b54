"""Forgetting: measures against one row at a time, a tiny model through two cells, gaps on synthetic records."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from models import character_tokenizer, tiny_llama

from studies.forgetting import __main__ as command
from studies.forgetting import data, report, train
from studies.forgetting import points as points_module
from studies.forgetting.cells import METHODS, cell
from studies.forgetting.measure import Yardstick
from studies.forgetting.points import AXES, Points

pytestmark = pytest.mark.hosts
ROWS = [data.Row((3, 4, 5, 6, 7), 2), data.Row((8, 9, 4), 1), data.Row((3, 3, 6, 5), 3)]
PAIRS = [data.Pair("kind", data.Row((2, 5, 6), 1), data.Row((2, 7, 8, 4), 1))]


def likelihood(model, row):
    """Log-likelihood of each counted token, one row by itself."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    return [logits[t - 1, row.ids[t]].item() for t in range(row.counted_from, len(row.ids))], logits


def test_a_look_is_what_one_row_at_a_time_gives():
    model, other = tiny_llama(), tiny_llama()
    before = [likelihood(other, row)[1] for row in ROWS]
    yardstick = Yardstick(model, {"task": ROWS}, PAIRS, 0)
    assert yardstick.look()["task"]["drift"] == [0.0] * 3
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.mul_(1.3)
    found = yardstick.look()
    assert found["task"]["loss"] == pytest.approx([-sum(likelihood(model, row)[0]) for row in ROWS], rel=1e-5)
    for row, was, drift in zip(ROWS, before, found["task"]["drift"], strict=True):
        now, places = likelihood(model, row)[1], slice(row.counted_from - 1, len(row.ids) - 1)
        assert drift == pytest.approx((was.exp() * (was - now))[places].sum().item(), rel=1e-3, abs=1e-5)
    more, less = (sum(likelihood(model, row)[0]) for row in (PAIRS[0].more, PAIRS[0].less))
    assert found["crows"] == pytest.approx([more - less], rel=1e-4, abs=1e-5)


@pytest.fixture
def tiny(tmp_path):
    """Folder of a random Llama with a tokenizer of characters, and one of data."""
    model, files = tmp_path / "model", tmp_path / "data"
    tiny_llama().save_pretrained(model)
    character_tokenizer().save_pretrained(model)
    files.mkdir()
    problem = json.dumps({"question": "a", "answer": "b <<1+1=2>>c"}) + "\n"
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        (files / name).write_text(problem * 8)
    with (files / "crows_pairs.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["sent_more", "sent_less", "bias_type"])
        writer.writerows([["a b", "b c", kind] for kind in ("age", "religion")])
    return model, files


@pytest.mark.slow
def test_cells_run_once_and_the_report_stands_beside_them(tiny, tmp_path, monkeypatch):
    sizes = train.Sizes(
        steps=2, looks=(1, 2), scales=(0.5,), batch=2, pool=8, test=2, documentation=2, instructions=2, text=8,
        per_kind=1, rank=2, trained_in="float32",
    )  # fmt: skip
    monkeypatch.setattr(command, "sizes_of", lambda quick: sizes)
    monkeypatch.chdir(tmp_path)
    model, files = map(str, tiny)
    given = ["--model", model, "--data", files, "--output", str(tmp_path / "out"), "--seeds", "1"]
    given += ["--cells", "lora-1e-3-*", "pissa-cr0.3-*"]
    assert command.main(given) == 0
    runs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").iterdir()}
    assert set(runs) == {"base", "lora-1e-3-s1", "pissa-cr0.3-s1", "pissa-cr0.3-anchors-s1"}
    places = [(point["step"], point["scale"]) for point in runs["lora-1e-3-s1"]["points"]]
    assert places == [(1, 1.0), (2, 1.0), (2, 0.5)]
    assert any("balora/share_consistency" in entry for entry in runs["pissa-cr0.3-s1"]["history"])
    with_anchors = {name for name, run in runs.items() if "balora/anchor_consistency" in str(run.get("history"))}
    assert with_anchors == {"pissa-cr0.3-anchors-s1"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "--cells pissa-cr0.3-s1" in text and "| pissa-cr0.3, 2 steps | 1 |" in text
    monkeypatch.setattr(train, "run", lambda *_: pytest.fail("run again"))
    assert command.main(given) == 0


@pytest.mark.slow
def test_anchors_are_not_what_is_measured(tmp_path):
    tokenizer = character_tokenizer()
    data.write_anchors(tmp_path / "anchors.jsonl", tokenizer, 40, 5)
    anchors = [json.loads(line)["text"] for line in (tmp_path / "anchors.jsonl").read_text().splitlines()]
    assert len(anchors) == data.ANCHORS
    assert not set(anchors) & {tokenizer.decode(row.ids[1:]) for row in data.documentation(tokenizer, 40, 5)}


def measured(loss, drift, scale=1.0, step=24):
    """A point whose rows all have one loss and drift."""
    rows = {"loss": [loss] * 4, "drift": [drift] * 4}
    return {"step": step, "scale": scale, "task": rows, "documentation": rows, "instructions": rows, "crows": [1, -1]}


def synthetic(method, *found):
    return [{**measured_of(method, seed), "points": list(found)} for seed in (1, 2)]


def measured_of(method, seed):
    return {"cell": cell(method, seed).name, "setting": {"method": method, "seed": seed}, "history": [], "seconds": 1}


def test_a_gap_is_the_distance_to_the_rivals_front_at_one_task_loss():
    rivals = synthetic("lora-1e-3", measured(1.0, 0.4), measured(1.2, 0.2, scale=0.5))
    terms = synthetic("pissa-cr0.3", measured(1.1, 0.25)) + synthetic("pissa-cr1", measured(0.9, 0.1))
    base = {"points": [measured(1.5, 0.0)], "tokens": {name: [1] * 4 for name in points_module.SETS}}
    points = Points(rivals + terms, base)
    found = report.gaps(points, AXES[0], repeats=20)
    by_name = {points.points[place].method: gap for place, gap in found.items()}
    assert by_name["pissa-cr0.3"].value == pytest.approx(0.25 - 0.3)
    assert by_name["pissa-cr0.3"].leaves_out_zero()
    assert np.isnan(by_name["pissa-cr1"].value), "no rival reaches its loss"


def test_rivals_are_the_methods_without_terms():
    rivals = {name for name, method in METHODS.items() if method.is_rival}
    assert rivals == {"lora-1e-3", "pissa-3e-4", "lora-3e-4", "pissa-1e-4", "lora-decay", "pissa-decay"}
