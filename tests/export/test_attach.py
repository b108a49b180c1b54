"""Adapters of a base whose vocabulary training made larger: read, shipped and merged."""

from __future__ import annotations

import json

import pytest
import torch
from exporting import error_in, loaded, refused, run, trained
from helpers import ba_lora, logits, stock
from models import VOCABULARY, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file

pytestmark = pytest.mark.hosts

ADDED = 4
CASES = [
    (make, tied, modules)
    for make in (ba_lora, stock)
    for tied in (False, True)
    for modules in (["embed_tokens", "lm_head"], ["embed_tokens"])
]


@pytest.fixture
def new_ids(ids):
    """Tokens, those added among them."""
    return torch.cat([ids, torch.arange(VOCABULARY, VOCABULARY + ADDED).expand(ids.shape[0], -1)], dim=1)


def grown(path):
    model = loaded(path)
    model.resize_token_embeddings(VOCABULARY + ADDED)
    return model


@pytest.mark.parametrize(("make", "tied", "modules"), CASES)
@pytest.mark.parametrize("given", ["original", "resized"])
def test_after_added_tokens_the_merged_model_is_exact(make, tied, modules, given, new_ids, tmp_path, capsys):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "original")
    base = grown(tmp_path / "original")
    base.save_pretrained(tmp_path / "resized")
    expected = trained(make(base, modules_to_save=modules), new_ids, tmp_path / "adapter")
    arguments = ["--merge", "--base", tmp_path / given, "--output", tmp_path / "out"]
    code, out, err = run(capsys, "export", tmp_path / "adapter", *arguments)
    assert code == 0, err
    assert error_in(out) < 1e-5
    assert ("the one it was trained on" in out) == (make is ba_lora)  # by its hash, new rows included
    assert ("100 rows" in out) == (given == "original")
    merged = loaded(tmp_path / "out")
    assert merged.config.vocab_size == VOCABULARY + ADDED
    torch.testing.assert_close(logits(merged, new_ids), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("make", "tied", "modules"), CASES)
def test_the_plain_export_holds_nothing_twice_and_says_who_takes_it(make, tied, modules, new_ids, tmp_path, capsys):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    expected = trained(make(grown(tmp_path / "base"), modules_to_save=modules), new_ids, tmp_path / "adapter")
    code, out, err = run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "out")
    assert code == 0, err
    assert "servers take no such adapter" in out and "--merge" in out
    assert "servers do not take" in (tmp_path / "out" / "README.md").read_text()
    written = {k: v for k, v in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_" not in k}
    assert set(written) == {f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")}
    model = PeftModel.from_pretrained(grown(tmp_path / "base"), tmp_path / "out").eval()
    torch.testing.assert_close(logits(model, new_ids), expected, rtol=0, atol=1e-5)
    # and what was exported merges as exactly
    arguments = ["--merge", "--base", tmp_path / "base", "--output", tmp_path / "merged"]
    code, out, err = run(capsys, "export", tmp_path / "out", *arguments)
    assert code == 0, err
    torch.testing.assert_close(logits(loaded(tmp_path / "merged"), new_ids), expected, rtol=0, atol=1e-5)


def test_another_base_is_still_refused_after_added_tokens(new_ids, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    trained(ba_lora(grown(tmp_path / "base"), modules_to_save=["embed_tokens"]), new_ids, tmp_path / "adapter")
    other = loaded(tmp_path / "base")
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    arguments = ["--merge", "--base", tmp_path / "other", "--output", tmp_path / "out"]
    assert "is not the base" in refused(capsys, "export", tmp_path / "adapter", *arguments)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"]])
def test_a_tied_base_of_which_one_end_was_trained_is_merged_into_two(modules, ids, tmp_path, capsys):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    expected = trained(ba_lora(loaded(tmp_path / "base"), modules_to_save=modules), ids, tmp_path / "adapter")
    arguments = ["--merge", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    code, _, err = run(capsys, "export", tmp_path / "adapter", *arguments)
    assert code == 0, err
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), ids), expected, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [False, True])
def test_the_size_that_is_said_is_the_files(tied, ids, tmp_path, capsys):
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    trained(ba_lora(loaded(tmp_path / "base")), ids, tmp_path / "adapter")
    arguments = ["--merge", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    _, out, _ = run(capsys, "export", tmp_path / "adapter", *arguments)
    said = next(line for line in out.splitlines() if line.startswith("writes")).rsplit(", ", 1)[1]
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert said == f"{sum(t.numel() * t.element_size() for t in tensors) / 1000:.3g} kB"
