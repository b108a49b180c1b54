"""Places and numbers that no command can work with: one line that names them, before anything is read or computed."""

from __future__ import annotations

import pytest
from exporting import refused
from helpers import stock
from models import tiny_llama

COMPARE = ["compare", "--model", "m", "--data", "d.jsonl"]


@pytest.mark.parametrize(
    "words",
    [[*COMPARE, "--output"], ["export", "{here}", "--output"], ["report", "{here}", "--output"],
     ["glue", "--recipe", "roberta-large", "--task", "rte", "--output"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_an_output_below_a_file_is_one_line(words, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    words = [word.format(here=tmp_path) for word in words]
    assert f"--output {file} is a file: name a directory." in refused(capsys, *words, file)
    below = refused(capsys, *words, file / "x" / "y")
    assert f"--output {file}/x/y lies in {file}, which is a file: name a directory." in below
    assert "--output /dev/null/x lies in /dev/null, which is a file" in refused(capsys, *words, "/dev/null/x")


def test_a_file_of_results_below_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("words")
    place = tmp_path / "text.txt" / "results.json"
    words = ["eval", "m", "--base", "m", "--drift", tmp_path / "text.txt", "--output", place]
    assert f"--output {tmp_path}/text.txt is a file: name a directory" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--rank", 2**40, "--rank 1099511627776: write a whole number from 1 to 2147483647."),
        ("--rank", 0, "--rank 0: write a whole number from 1 to"),
        ("--seeds", 2**32, "--seeds 4294967296: write whole numbers from 0 to 4294967295."),
        ("--seeds", -1, "--seeds -1: write whole numbers from 0 to"),
    ],
)
def test_numbers_beyond_their_range_are_told_its_end(option, value, said, tmp_path, capsys):
    assert said in refused(capsys, *COMPARE, "--output", tmp_path / "out", option, value)


def test_a_rank_of_an_export_beyond_its_range(tmp_path, capsys):
    line = refused(capsys, "export", tmp_path, "--output", tmp_path / "out", "--rank", 2**31)
    assert "write a whole number from 1 to 2147483647, or auto" in line


@pytest.mark.parametrize(
    "words",
    [["eval", "--drift", "{here}/text.txt", "--base"], ["compare", "--data", "d", "--output", "{here}/out", "--model"],
     ["verify", "{here}", "--base"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_an_adapter_in_the_place_of_a_model_is_one_line(words, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    stock(tiny_llama(), targets=["q_proj"]).save_pretrained(adapter)
    words = [word.format(here=adapter if words[0] == "verify" else tmp_path) for word in words]
    assert f"{words[-1]} {adapter} is an adapter: give the model it was trained on." in refused(capsys, *words, adapter)
