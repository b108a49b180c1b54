"""balora eval: forms of adapters, what is refused before a model loads, files and exit codes. No lm-eval here."""

from __future__ import annotations

import json
import math

import pytest
import torch
from classifiers import classifier
from exporting import loaded, refused, run
from helpers import ba_lora, stock, train
from models import character_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from balora_plugin.commands import eval as command

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base with its tokenizer, texts and pairs on disk."""
    place = tmp_path_factory.mktemp("eval")
    tiny_llama(max_position_embeddings=512).save_pretrained(place / "base")
    character_tokenizer().save_pretrained(place / "base")
    (place / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen. " * 3)
    (place / "pairs.csv").write_text("sent_more,sent_less,bias_type\nWe lie,You lie,age\nI am old,I am new,age\n")
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Say a.", "Say b."]},
        {"question_id": 111, "category": "math", "turns": ["1 + 1?"]},
    ]
    (place / "question.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    return place


@pytest.fixture
def adapter(place, ids, tmp_path):
    """Trains an adapter made by a function of the base, and saves it."""

    def make(wrap, **options):
        model = wrap(loaded(place / "base"), **options)
        train(model, ids)
        model.save_pretrained(tmp_path / "adapter")
        return model.eval()

    return make


def results(path):
    """{(task, metric): row} of a file that was written."""
    return {(row["task"], row["metric"]): row for row in json.loads(path.read_text())["results"]}


def drift_of(capsys, place, tmp_path, *arguments):
    """(stderr, rows, whole file) of a run with --drift."""
    output = tmp_path / "results.json"
    base, text = place / "base", place / "text.txt"
    code, _, err = run(
        capsys, "eval", *arguments, "--base", base, "--drift", text, "--context", 40, "--output", output, "--overwrite"
    )
    assert code == 0, err
    return err, results(output), json.loads(output.read_text())


@pytest.mark.parametrize(
    ("wrap", "options", "one_model"),
    [
        (ba_lora, {}, True),
        (stock, {}, True),
        (stock, {"use_dora": True}, True),
        (stock, {"modules_to_save": ["lm_head"]}, True),
        (stock, {"bias": "all"}, False),  # switched off, its biases stay
    ],
    ids=["ba_lora", "lora", "dora", "head", "bias"],
)
def test_every_form_of_adapter_is_measured_against_its_base(wrap, options, one_model, adapter, place, capsys, tmp_path):
    if "bias" in options:
        changes = {"attention_bias": True}
        tiny_llama(max_position_embeddings=512, **changes).save_pretrained(tmp_path / "biased")
        character_tokenizer().save_pretrained(tmp_path / "biased")
        place = _as_place(place, tmp_path)
        model = wrap(loaded(place / "base"), **options)
        train(model, torch.randint(3, 96, (2, 12)), lr=5e-2)
        model.save_pretrained(tmp_path / "adapter")
    else:
        adapter(wrap, **options)
    err, rows, whole = drift_of(capsys, place, tmp_path, tmp_path / "adapter")
    assert whole["one_model"] is one_model
    assert ("loaded twice" in err) is not one_model
    _, alone, _ = drift_of(capsys, place, tmp_path)
    loss = rows["drift:text.txt", "loss"]
    assert loss["base"] == alone["drift:text.txt", "loss"]["base"]  # bit for bit: nothing of the adapter is in it
    assert loss["difference"]["value"] == pytest.approx(loss["adapter"]["value"] - loss["base"]["value"])
    assert abs(loss["difference"]["value"]) > 10 * abs(1e-6)
    assert rows["drift:text.txt", "kl_from_base"]["adapter"]["value"] > 1e-5


def _as_place(place, tmp_path):
    (tmp_path / "biased").rename(tmp_path / "base")
    (tmp_path / "text.txt").write_text((place / "text.txt").read_text())
    return tmp_path


def test_a_merged_model_is_measured_as_its_adapter_is(adapter, place, capsys, tmp_path):
    model = adapter(ba_lora)
    _, switched, _ = drift_of(capsys, place, tmp_path, tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    _, merged, whole = drift_of(capsys, place, tmp_path, tmp_path / "merged")
    assert not whole["one_model"]
    for metric in ("loss", "entropy", "kl_from_base"):
        one, two = (rows["drift:text.txt", metric] for rows in (switched, merged))
        assert one["adapter"]["value"] == pytest.approx(two["model"]["value"], rel=1e-3)


def test_crows_pairs_and_answers_for_mt_bench(adapter, place, capsys, tmp_path):
    adapter(ba_lora)
    code, out, err = run(
        capsys, "eval", tmp_path / "adapter", "--base", place / "base", "--tasks", "crows_pairs,mt_bench",
        "--data", f"crows_pairs={place / 'pairs.csv'}", f"mt_bench={place / 'question.jsonl'}",
        "--max-new-tokens", 6, "--output", tmp_path / "out" / "r.json",
    )  # fmt: skip
    assert code == 0, err
    rows = results(tmp_path / "out" / "r.json")
    assert rows["crows_pairs", "pct_stereotype, age"]["documents"] == 2
    assert "| crows_pairs | pct_stereotype, age |" in " ".join(out.split())
    for side in ("base", "adapter"):  # what FastChat's load_model_answers reads
        lines = (tmp_path / "out" / "r_mt_bench" / f"{side}.jsonl").read_text().splitlines()
        answers = {answer["question_id"]: answer for answer in map(json.loads, lines)}
        assert set(answers) == {81, 111}
        assert [len(answers[n]["choices"][0]["turns"]) for n in (81, 111)] == [2, 1]
        assert all(answer["model_id"] == side and answer["choices"][0]["index"] == 0 for answer in answers.values())
        assert {"answer_id", "tstamp"} <= set(answers[81])


def test_the_same_seed_gives_the_same_answers(place, capsys, tmp_path):
    said = []
    for name in ("a", "b"):
        run(
            capsys, "eval", "--base", place / "base", "--tasks", "mt_bench", "--max-new-tokens", 6,
            "--data", f"mt_bench={place / 'question.jsonl'}", "--output", tmp_path / f"{name}.json",
        )  # fmt: skip
        text = (tmp_path / f"{name}_mt_bench" / "base.jsonl").read_text()
        said.append([json.loads(line)["choices"] for line in text.splitlines()])
    assert said[0] == said[1]


def test_a_model_that_computes_nan_is_said(place, capsys, tmp_path):
    broken = loaded(place / "base")
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    character_tokenizer().save_pretrained(tmp_path / "broken")
    code, out, _ = run(capsys, "eval", "--base", tmp_path / "broken", "--drift", place / "text.txt")
    assert code == 1 and "drift:text.txt, loss: a model computes NaN or inf" in out


# --- refused, before a model is loaded


@pytest.fixture
def never_loads(monkeypatch):
    """No model may be loaded."""

    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command, "load_base", load)


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name --tasks or a --drift FILE"),
        (["--drift", "{place}/gone.txt"], "there is no file"),
        (["--drift", "{place}/text.txt", "--limit", "0"], "--limit 0: write a number of at least 1"),
        (["--drift", "{place}/text.txt", "--batch-size", "0"], "--batch-size 0"),
        (["--drift", "{place}/text.txt", "--context", "1"], "--context 1"),
        (["--drift", "{place}/text.txt", "--device", "toaster"], "--device toaster cannot be used here"),
        (["--drift", "{place}/text.txt", "--tokenizer", "{place}"], "holds no tokenizer"),
        (["--drift", "{place}/text.txt", "--output", "{place}"], "is a directory: name a file"),
        (["--drift", "{place}/text.txt", "--output", "{place}/pairs.csv"], "is there already"),
        (["--drift", "{place}/text.txt", "--code-seconds", "0"], "--code-seconds 0"),
        (["--tasks", "crows_pairs"], "add --data crows_pairs=FILE"),
        (["--tasks", "crows_pairs", "--data", "crows_pairs"], "write TASK=FILE"),
        (["--tasks", "crows_pairs", "--data", "crows_pairs={place}/gone.csv"], "there is no file"),
        (["--tasks", "crows_pairs", "--data", "crows_pairs={place}/question.jsonl"], "row 1 lacks sent_more"),
        (["--tasks", "mt_bench", "--data", "mt_bench={place}/question.jsonl"], "say where by --output"),
        (
            ["--tasks", "mt_bench", "--data", "mt_bench={place}/pairs.csv", "--output", "{place}/r.json"],
            "row 1 lacks question_id or turns",
        ),
        (["--drift", "{place}/text.txt", "--data", "crows_pairs={place}/pairs.csv"], "it is not among --tasks"),
        (["--drift", "{place}/text.txt", "--include-path", "{place}/gone"], "is no directory"),
    ],
)
def test_what_cannot_be_done_is_said_first(arguments, said, place, capsys):
    words = [word.format(place=place) for word in arguments]
    assert said in refused(capsys, "eval", "--base", place / "base", *words)


@pytest.mark.usefixtures("never_loads")
def test_adapters_that_are_not_measured_here_name_what_does(place, capsys, tmp_path):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    config = LoraConfig(init_lora_weights="pissa", target_modules="all-linear", task_type="CAUSAL_LM", r=4)
    made = {
        "prompt": get_peft_model(tiny_llama(), prompt),
        "raw": get_peft_model(tiny_llama(), config),
        "classes": stock(classifier(), task_type="SEQ_CLS"),
    }
    for name, said in (("prompt", "python -m lm_eval"), ("raw", "balora export"), ("classes", "balora glue")):
        made[name].save_pretrained(tmp_path / name)
        line = refused(capsys, "eval", tmp_path / name, "--base", place / "base", "--drift", place / "text.txt")
        assert said in line


def test_another_base_is_refused(adapter, place, capsys, tmp_path):
    adapter(ba_lora)
    other = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    character_tokenizer().save_pretrained(tmp_path / "other")
    line = refused(capsys, "eval", tmp_path / "adapter", "--base", tmp_path / "other", "--drift", place / "text.txt")
    assert "is not the base that" in line


@pytest.mark.usefixtures("never_loads")
def test_what_is_neither_adapter_nor_model_is_named(place, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "eval", tmp_path / "empty", "--base", place / "base", "--drift", place / "text.txt")
    assert line.startswith(f"Error: ADAPTER {tmp_path / 'empty'} holds neither")
