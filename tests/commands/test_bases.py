"""Adapters of a quantised base: what they merge into, and what their cards load."""

from __future__ import annotations

import re

import pytest
import torch
from exporting import error_in, loaded, refused, run
from helpers import ba_lora, logits, train
from models import QUANTISED, load_quantised, tiny_llama

from balora_plugin.pretrained import probe

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.hosts


@pytest.fixture(params=["nf4_double", "int8"])
def kind(request):
    return request.param


@pytest.fixture
def trained(kind, ids, tmp_path):
    """The logits of an adapter trained over a quantised base; both on disk."""
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    model = ba_lora(load_quantised(tmp_path / "base", kind))
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    return logits(model, ids)


def warnings_in(out):
    return [line for line in out.splitlines() if line.startswith("WARNING")]


def stored_kl(directory, model):
    """KL(trained || model), KL(trained || base) on the stored probe."""
    stored = probe.read_probe(str(directory / "ba_lora_probe.safetensors"))
    with torch.no_grad():
        here = model(input_ids=probe.token_ids(stored.vocabulary)).logits[0, list(probe.POSITIONS)]
    here = here[:, probe.columns(stored.vocabulary)]
    one, other, before = (z.double().log_softmax(-1) for z in (stored.adapted, here, stored.base))
    return tuple(float((one.exp() * (one - z)).sum(-1).mean()) for z in (other, before))


@pytest.mark.parametrize("exported", [False, True])
def test_by_default_it_merges_into_what_was_trained(exported, trained, ids, tmp_path, capsys):
    if exported:
        run(capsys, "export", tmp_path / "adapter", "--output", tmp_path / "plain")
    source = tmp_path / ("plain" if exported else "adapter")
    arguments = ["export", source, "--merge", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert "the one it was trained on, dequantised from bitsandbytes" in out and not warnings_in(out)
    assert error_in(out) < 1e-4
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), ids), trained, rtol=0, atol=1e-4)
    assert "dequantised from" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_is_stored_quantised_is_merged_into_too(kind, trained, ids, tmp_path, capsys):
    load_quantised(tmp_path / "base", kind).save_pretrained(tmp_path / "stored")
    arguments = ["export", tmp_path / "adapter", "--merge", "--base", tmp_path / "stored", "--output", tmp_path / "out"]
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    assert "the one it was trained on, dequantised" in out and not warnings_in(out)
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), ids), trained, rtol=0, atol=1e-4)


def test_merging_into_the_full_precision_is_another_model_and_says_how_far(trained, ids, tmp_path, capsys):
    arguments = ["--merge", "--merge-into", "full", "--base", tmp_path / "base", "--output", tmp_path / "out"]
    code, out, err = run(capsys, "export", tmp_path / "adapter", *arguments)
    assert code == 0, err
    assert len(warnings_in(out)) == 1 and "--merge-into trained" in out
    said = re.search(r"KL (\S+) on the stored probe, \S+ of the (\S+) that training moved", warnings_in(out)[0])
    merged = loaded(tmp_path / "out")
    for value, expected in zip(said.groups(), stored_kl(tmp_path / "adapter", merged), strict=True):
        assert abs(float(value) / expected - 1) < 0.06
    assert (logits(merged, ids) - trained).abs().max() > 1e-3


def test_losses_are_measured_on_the_quantised_base(trained, tmp_path, capsys):
    arguments = ["--rank", 2, "--base", tmp_path / "base", "--output", tmp_path / "out"]
    code, out, err = run(capsys, "export", tmp_path / "adapter", *arguments)
    assert code == 0, err
    assert "the one it was trained on" in out and not warnings_in(out)
    _, moved = stored_kl(tmp_path / "adapter", loaded(tmp_path / "base"))
    said = float(re.search(r"of the (\S+) that training moved", out)[1])
    assert abs(said / moved - 1) < 0.06


def test_the_choice_is_no_choice_elsewhere(trained, tmp_path, capsys):
    arguments = ["export", tmp_path / "adapter", "--output", tmp_path / "out", "--merge-into"]
    assert "--merge-into full needs --merge" in refused(capsys, *arguments, "full")
    assert "'half'" in refused(capsys, *arguments, "half", "--merge", "--base", tmp_path / "base")


@pytest.mark.parametrize("exported", [False, True])
def test_the_cards_snippet_loads_the_model_that_was_trained(exported, kind, trained, ids, tmp_path, capsys):
    directory = tmp_path / "adapter"
    if exported:
        directory = tmp_path / "plain"
        run(capsys, "export", tmp_path / "adapter", "--base", tmp_path / "base", "--output", directory)
    card = (directory / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    for key, value in QUANTISED[kind].items():
        default = key == "bnb_4bit_compute_dtype" or value == "fp4"
        assert default or f"{key}={value!r}" in snippet
    found = {}
    exec(snippet.replace('"."', repr(str(directory))), found)  # our own text
    torch.testing.assert_close(logits(found["model"].train(), ids), trained, rtol=0, atol=1e-3)
