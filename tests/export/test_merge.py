"""What a merged model is written with, and what export says of adapters that it does not merge."""

from __future__ import annotations

import json

import pytest
import torch
from classifiers import batch, classifier
from exporting import loaded, refused, run, trained
from helpers import ba_lora, logits, stock
from models import tiny_llama
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

pytestmark = pytest.mark.hosts


def test_settings_of_generation_that_transformers_does_not_save_hold_no_merge_up(ids, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    expected = trained(ba_lora(loaded(tmp_path / "base")), ids, tmp_path / "adapter")
    written = {"temperature": 0.7, "top_p": 0.6, "do_sample": False, "max_length": 77}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(written))
    arguments = ["--merge", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    code, _, err = run(capsys, "export", tmp_path / "adapter", *arguments)
    assert code == 0, err
    model = loaded(tmp_path / "out")
    torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-5)
    assert {key: getattr(model.generation_config, key) for key in written} == written


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_is_exported_and_told_how_to_merge(kind, tmp_path, capsys):
    classifier(kind).save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")

    ba_lora(base(), targets=None, task_type="SEQ_CLS").eval().save_pretrained(tmp_path / "adapter")
    code, out, err = run(capsys, "export", tmp_path / "adapter", "--rank", 2, "--output", tmp_path / "out")
    assert code == 0, err
    assert "own embedding or head" not in out and "--merge" not in out and "--base MODEL" not in out
    assert "merge with PEFT" in out
    assert PeftModel.from_pretrained(base(), tmp_path / "out")(**batch()).logits.isfinite().all()
    to = ["export", tmp_path / "adapter", "--base", tmp_path / "base", "--output", tmp_path / "no"]
    line = refused(capsys, *to)
    assert "task_type='SEQ_CLS'" in line and "Leave --base out" in line
    line = refused(capsys, *to, "--merge")
    assert "Leave --base out" not in line and "merges with PEFT" in line and "merge_and_unload()" in line


def test_an_adapted_head_is_not_taken_for_added_tokens(ids, tmp_path, capsys):
    trained(stock(tiny_llama(), targets=["q_proj", "lm_head"], init_lora_weights=False), ids, tmp_path / "adapter")
    code, out, err = run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert code == 0, err
    assert "where tokens were" in out and "added, or where they are adapted" in out


@pytest.mark.parametrize("make", [ba_lora, stock])
@pytest.mark.parametrize("options", [{}, {"ensure_weight_tying": True}], ids=["", "tied by PEFT"])
def test_whole_modules_beside_a_rank_that_is_looked_for_and_in_a_merge(make, options, ids, tmp_path, capsys):
    if make is ba_lora and options:
        pytest.skip("BA-LoRA refuses it")
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = make(loaded(tmp_path / "base"), targets=["q_proj", "v_proj"], modules_to_save=["embed_tokens"], **options)
    expected = trained(model, ids, tmp_path / "adapter")
    to = ["export", tmp_path / "adapter", "--base", tmp_path / "base", "--output"]
    code, out, err = run(capsys, *to, tmp_path / "small", "--rank", "auto", "--max-error", 0.1)
    assert code == 0 and "of the" in out, err
    code, _, err = run(capsys, *to, tmp_path / "merged", "--merge")
    assert code == 0, err
    torch.testing.assert_close(logits(loaded(tmp_path / "merged"), ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", ["²", "9" * 5000, "-1", "0", "1.5", "٣"])
def test_what_is_no_rank_is_said_in_one_short_line(rank, tmp_path, capsys):
    line = refused(capsys, "export", tmp_path, "--output", tmp_path / "out", f"--rank={rank}")
    assert "is no rank: write a whole number from 1 to 2147483647, or auto" in line and len(line) < 200
