"""Sums over documents against float64 logits, one document at a time; CrowS-Pairs by hand."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import ba_lora, train
from models import tiny_llama
from transformers import AutoModelForCausalLM

from balora_plugin.evaluation.crows_pairs import Pair, crows_figures, read_pairs
from balora_plugin.evaluation.documents import TokenDocument, whole_text
from balora_plugin.evaluation.drift import figures_of
from balora_plugin.evaluation.figures import measured
from balora_plugin.evaluation.scoring import score_documents
from balora_plugin.evaluation.sides import Side

pytestmark = pytest.mark.hosts


@pytest.fixture
def sides():
    """Two models that differ."""
    other = tiny_llama()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return [Side("base", tiny_llama().eval()), Side("adapter", other.eval())]


@pytest.fixture
def documents():
    draw = torch.Generator().manual_seed(5)
    found = []
    for length in (5, 12, 9):
        ids = torch.randint(3, 96, (length,), generator=draw).tolist()
        found.append(TokenDocument(tuple(ids), tuple(i > 1 and i % 3 != 0 for i in range(length))))
    return found


def reference(model, document):
    """The float64 log-probabilities (counted, V) that predict the counted tokens, and those tokens."""
    model = model.double()
    with torch.no_grad():
        log = model(input_ids=torch.tensor([document.ids])).logits[0].log_softmax(-1)
    at = [i for i, counts in enumerate(document.counted) if counts]
    return log[[i - 1 for i in at]], torch.tensor([document.ids[i] for i in at])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_sums_are_those_of_float64_logits(sides, documents, batch_size):
    scored = score_documents(sides, documents, batch_size, "test")
    for number, document in enumerate(documents):
        logs = []
        for side in sides:
            log, targets = reference(side.model, document)
            logs.append(log)
            sums = scored.sides[side.name][number]
            assert sums.count == len(targets) == sum(document.counted)
            assert sums.loss == pytest.approx(-log.gather(1, targets[:, None]).sum().item(), rel=1e-5)
            assert sums.entropy == pytest.approx(-(log.exp() * log).sum().item(), rel=1e-5)
            assert sums.hits == (log.argmax(-1) == targets).sum().item()
            assert sums.bins[:, 1].sum() == pytest.approx(log.max(-1).values.exp().sum().item(), rel=1e-5)
            side.model.float()
        kl = (logs[0].exp() * (logs[0] - logs[1])).sum().item()
        assert scored.drift[number] == pytest.approx(kl, rel=1e-4) and kl > 0.01


def test_drift_is_a_mean_over_counted_tokens_and_of_the_adapter_alone(sides, documents):
    scored = score_documents(sides, documents, 2, "test")
    figures = {figure.name: figure for figure in figures_of("drift:x", scored)}
    kl = figures["kl_from_base"]
    assert list(kl.values) == ["adapter"]
    count = sum(sum(document.counted) for document in documents)
    assert measured(kl, "adapter").value == pytest.approx(sum(scored.drift) / count)
    loss = sum(sums.loss for sums in scored.sides["base"]) / count
    assert measured(figures["loss"], "base").value == pytest.approx(loss)
    alone = figures_of("drift:x", score_documents(sides[:1], documents, 2, "test"))
    assert [figure.name for figure in alone] == ["loss", "entropy", "accuracy", "ece"]


def test_two_vocabularies_are_refused(sides, documents):
    larger = Side("model", tiny_llama(vocab_size=100).eval())
    with pytest.raises(ValueError, match=r"96 and 100 entries.*--drift"):
        score_documents([sides[0], larger], documents, 1, "test")


def test_crows_pairs_counts_the_likelier_sentence(sides, tokenizer):
    pairs = [Pair("We are tall.", "You are tall.", "age"), Pair("a b", "a c d", "gender"), Pair("x", "yy", "age")]
    figures = {f.name: f for f in crows_figures(pairs, sides, tokenizer, batch_size=2)}
    for side in sides:
        likelihood = {}
        for pair in pairs:
            for text in (pair.more, pair.less):
                log, targets = reference(side.model, whole_text(text, tokenizer))
                likelihood[text] = log.gather(1, targets[:, None]).sum().item()
        first = [float(likelihood[pair.more] > likelihood[pair.less]) for pair in pairs]
        assert list(figures["pct_stereotype"].values[side.name]) == first
        assert list(figures["pct_stereotype, age"].values[side.name]) == [first[0], first[2]]
        apart = [abs(likelihood[pair.more] - likelihood[pair.less]) for pair in pairs]
        assert list(figures["likelihood_diff"].values[side.name]) == pytest.approx(apart, rel=1e-4)
        side.model.float()


def test_pairs_are_read_from_csv_and_json(tmp_path):
    (tmp_path / "a.csv").write_text(',sent_more,sent_less,bias_type\n0,"One, two",Three,age\n')
    rows = [{"sent_more": "One, two", "sent_less": "Three", "bias_type": "age"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]) + "\n")
    expected = [Pair("One, two", "Three", "age")]
    assert read_pairs(str(tmp_path / "a.csv")) == read_pairs(str(tmp_path / "a.jsonl")) == expected
    (tmp_path / "b.csv").write_text("sent_more,bias_type\nOne,age\n")
    with pytest.raises(ValueError, match="row 1 lacks sent_less"):
        read_pairs(str(tmp_path / "b.csv"))


def test_a_switched_adapter_is_scored_as_two_models_are(tmp_path, ids, documents):
    """One model, its adapter on and off, gives what base and merged model give apart."""
    from balora_plugin.evaluation.sides import ordinary_lora, with_adapter

    tiny_llama().save_pretrained(tmp_path / "base")

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()

    model = ba_lora(base())
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    directory = str(tmp_path / "adapter")
    switched = with_adapter(base(), directory, ordinary_lora(directory, {"peft_type": "LORA"}), lambda: 1 / 0)
    assert switched[0].model is switched[1].model
    apart = [Side("base", base()), Side("adapter", model.eval().merge_and_unload())]
    one, two = score_documents(switched, documents, 2, "test"), score_documents(apart, documents, 2, "test")
    assert one.drift == pytest.approx(two.drift, rel=1e-3) and min(one.drift) > 1e-3
    assert [s.loss for s in one.sides["base"]] == [s.loss for s in two.sides["base"]]
    assert [s.loss for s in one.sides["adapter"]] == pytest.approx([s.loss for s in two.sides["adapter"]], rel=1e-5)
