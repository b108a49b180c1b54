"""What export says is lost: KL divergences of predictions, of the stored probe's tokens or a text."""

from __future__ import annotations

import json
import re

import pytest
import torch
from exporting import error_in, loaded, refused, run
from helpers import ba_lora, train
from models import character_tokenizer, tiny_llama
from peft import PeftModel

from balora_plugin.export import prediction
from balora_plugin.pretrained import probe

pytestmark = pytest.mark.hosts

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture
def trained(ids, tmp_path):
    """A base with a tokenizer, an adapter of rank 16 in which small directions carry much of the norm, and a text."""
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    model = ba_lora(loaded(tmp_path / "base"), r=8)
    train(model, ids, steps=8)
    model.eval().save_pretrained(tmp_path / "adapter")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def said(out):
    """(kl, relative, moved) that was printed."""
    line = next(line for line in out.splitlines() if line.startswith("kl"))
    return tuple(float(x) for x in re.match(r"kl +(\S+) on .*, (\S+) of the (\S+) that", line).groups())


def dense(model, ids, rows, columns):
    with torch.no_grad():
        return model(input_ids=ids).logits[0, rows][:, columns].double().log_softmax(-1)


def kl(one, other):
    return float((one.exp() * (one - other)).sum(-1).mean())


def models(directory, out):
    base = loaded(directory / "base")
    uncut = PeftModel.from_pretrained(loaded(directory / "base"), directory / "adapter").eval()
    return uncut, base, PeftModel.from_pretrained(loaded(directory / "base"), directory / out).eval()


@pytest.mark.parametrize("data", [False, True])
def test_the_kl_that_is_said_is_that_of_the_models(data, trained, capsys):
    arguments = ["--rank", 3, "--base", trained / "base", "--output", trained / "out"]
    extra = ["--data", trained / "text.txt"] if data else []
    code, out, err = run(capsys, "export", trained / "adapter", *arguments, *extra)
    assert code == 0, err
    if data:
        ids = character_tokenizer()(TEXT, return_tensors="pt")["input_ids"][:, : 4 * 256]
        parts = [(window, slice(None), slice(None)) for window in ids.split(256, dim=1)]
    else:
        parts = [(probe.token_ids(300), list(probe.POSITIONS), probe.columns(300))]
    uncut, base, cut = (torch.cat([dense(m, *part) for part in parts]) for m in models(trained, "out"))
    lost, relative, moved = said(out)
    assert abs(lost / kl(uncut, cut) - 1) < 0.06 and abs(moved / kl(uncut, base) - 1) < 0.06  # two digits are said
    assert abs(relative / (kl(uncut, cut) / kl(uncut, base)) - 1) < 0.06
    assert error_in(out) > 0 and "Frobenius" in out
    assert "KL to the adapter" in (trained / "out" / "README.md").read_text()


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("allowed", [0.2, 0.02])
def test_rank_auto_is_the_smallest_that_keeps_the_predictions(data, allowed, trained, capsys):
    arguments = ["--base", trained / "base", *(["--data", trained / "text.txt"] if data else [])]
    to = ["export", trained / "adapter", *arguments, "--output"]
    code, out, err = run(capsys, *to, trained / "auto", "--rank", "auto", "--max-error", allowed)
    assert code == 0, err
    assert said(out)[1] <= allowed
    rank = json.loads((trained / "auto" / "adapter_config.json").read_text())["r"]
    assert 1 < rank < 16
    _, out, _ = run(capsys, *to, trained / "less", "--rank", rank - 1)
    assert said(out)[1] > allowed * 0.95
    # by its weights alone it would keep more
    code, out, _ = run(
        capsys,
        "export",
        trained / "adapter",
        "--output",
        trained / "weights",
        *("--rank", "auto"),
        "--max-error",
        allowed,
    )
    assert code == 0 and "was held against it" in out and "--base MODEL measures" in out
    assert json.loads((trained / "weights" / "adapter_config.json").read_text())["r"] > rank


def test_an_error_that_cannot_be_met_is_refused(trained, capsys):
    arguments = ["--base", trained / "base", "--rank", "auto", "--max-error", 1e-9, "--dtype", "bfloat16"]
    line = refused(capsys, "export", trained / "adapter", "--output", trained / "no", *arguments)
    assert "max_error=1e-09" in line and "bfloat16" in line


def test_a_merge_says_what_rounding_does_to_predictions(trained, capsys):
    arguments = ["export", trained / "adapter", "--merge", "--base", trained / "base", "--output"]
    _, out, _ = run(capsys, *arguments, trained / "exact")
    assert said(out)[1] < 1e-4 and "bfloat16" not in out
    _, out, _ = run(capsys, *arguments, trained / "rounded", "--dtype", "bfloat16")
    merged = loaded(trained / "rounded")
    part = probe.token_ids(300), list(probe.POSITIONS), probe.columns(300)
    uncut, base, _ = (dense(m, *part) for m in models(trained, "adapter"))
    lost, _, moved = said(out)
    assert abs(lost / kl(uncut, dense(merged, *part)) - 1) < 0.06
    assert abs(moved / kl(uncut, base) - 1) < 0.06
    assert "rounding the weights takes much" not in out


def test_what_cannot_be_measured_on_is_refused(trained, capsys):
    (trained / "empty").write_text("")
    (trained / "binary").write_bytes(b"\xff\xfe\x00\x81")
    for data, word in (("empty", "less than two tokens"), ("binary", "no UTF-8 text"), ("nothing", "is no file")):
        arguments = ["--base", trained / "base", "--data", trained / data, "--output", trained / "out"]
        line = refused(capsys, "export", trained / "adapter", *arguments)
        assert f"--data {trained / data}" in line and word in line
    line = refused(capsys, "export", trained / "adapter", "--data", trained / "text.txt", "--output", trained / "out")
    assert "--data" in line and "--base MODEL" in line
    tiny_llama(vocab_size=300).save_pretrained(trained / "bare")
    arguments = ["--base", trained / "bare", "--data", trained / "text.txt", "--output", trained / "out"]
    assert "needs a tokenizer" in refused(capsys, "export", trained / "adapter", *arguments)


@pytest.mark.parametrize("shift", [0.0, 1e4])  # of logits: it changes no prediction
def test_near_predictions_are_told_apart(shift):
    exact = torch.randn(70, 300) + shift
    other = exact + 1e-5 * torch.randn(70, 300) * (1 + shift)
    one, two = (z.double().log_softmax(-1) for z in (exact, other))
    expected = float((one.exp() * (one - two)).sum(-1).mean())
    assert abs(prediction.mean_kl([exact], [other]) / expected - 1) < 1e-6


def test_what_rounding_does_is_of_the_size_that_it_has():
    exact = 4 * torch.randn(64, 500, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16).double()
    estimate = prediction.rounding([exact], torch.finfo(torch.bfloat16).eps)
    assert 1 < estimate / prediction.mean_kl([exact], [rounded]) < 60  # layers round too
    assert prediction.rounding([torch.tensor([[0.0, -torch.inf]])], 0.1) == 0.0  # a column that is left out


@pytest.mark.parametrize("lr", [1e-9, 1e-2])
def test_what_rounding_alone_does_is_no_measure(lr, ids, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = ba_lora(loaded(tmp_path / "base"))
    train(model, ids, steps=2, lr=lr)
    model.eval().save_pretrained(tmp_path / "adapter")
    auto = ["export", tmp_path / "adapter", "--rank", "auto", "--max-error", 0.3, "--output"]
    code, out, err = run(capsys, *auto, tmp_path / "measured", "--base", tmp_path / "base")
    assert code == 0, err
    run(capsys, *auto, tmp_path / "weights")
    ranks = [json.loads((tmp_path / name / "adapter_config.json").read_text())["r"] for name in ("measured", "weights")]
    if lr == 1e-9:
        assert "kl       not measurable on the probe: training moved it by" in out and "rounding alone" in out
        assert "--max-error 0.3 was held against it" in out and "--base MODEL" not in out and error_in(out) <= 0.3
        assert ranks[0] == ranks[1]
        assert "not measurable" in (tmp_path / "measured" / "README.md").read_text()
    else:
        assert "not measurable" not in out and said(out)[1] <= 0.3 and ranks[0] < ranks[1]


def test_a_divergence_is_the_formula():
    one, other = (torch.randn(5, 7).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(other, one, log_target=True, reduction="batchmean").item()
    assert abs(prediction.mean_kl([one[:2], one[2:]], [other[:2], other[2:]]) - expected) < 1e-6
    assert prediction.mean_kl([one], [one]) == 0.0
