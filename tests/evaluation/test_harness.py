"""lm-eval's tasks through balora eval: the figures are those of its own command line."""

from __future__ import annotations

import json
import sys

import pytest
from exporting import loaded, refused, run
from helpers import ba_lora, train
from models import character_tokenizer, tiny_llama

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install '.[eval]'")
pytestmark = pytest.mark.hosts

CHOICES = """\
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: PLACE/choices.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
ANSWERS = """\
task: tiny_answers
dataset_path: json
dataset_kwargs: {data_files: {test: PLACE/answers.jsonl, train: PLACE/answers.jsonl}}
test_split: test
fewshot_split: train
num_fewshot: 1
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["A"], do_sample: false, max_gen_toks: 6}
metric_list:
  - {metric: chars, aggregation: mean, higher_is_better: true}
process_results: !function functions.chars
metadata: {version: 1.0}
"""
TEXTS = """\
task: tiny_texts
dataset_path: json
dataset_kwargs: {data_files: {test: PLACE/answers.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
metadata: {version: 1.0}
"""
FUNCTIONS = 'def chars(doc, results):\n    return {"chars": float(len(set(results[0])))}\n'
PROGRAM = {
    "prompt": 'def add(a, b):\n    """Adds."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, an adapter, data and tasks on disk."""
    place = tmp_path_factory.mktemp("harness")
    tokenizer = character_tokenizer()
    # lm-eval's command line cuts the vocabulary of a model with an adapter to the tokenizer's, which here is all of it
    tiny_llama(max_position_embeddings=512, vocab_size=len(tokenizer)).save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    model = ba_lora(loaded(place / "base"))
    train(model, model.get_input_embeddings().weight.new_tensor([[5, 9, 30, 41, 8, 70, 12, 33]]).long(), lr=5e-2)
    model.save_pretrained(place / "adapter")
    rows = {
        "choices": [
            {"question": f"Is {i} small?", "choices": [" yes", " no", " not at all"], "gold": i % 3} for i in range(9)
        ],
        "answers": [{"question": f"What is {i} + {i}? Say", "answer": f" {2 * i} #### {2 * i}"} for i in range(5)],
        "programs": [PROGRAM],
    }
    for name, each in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    (place / "tasks").mkdir()
    for name, text in (("choices", CHOICES), ("answers", ANSWERS), ("texts", TEXTS)):
        (place / "tasks" / f"{name}.yaml").write_text(text.replace("PLACE", str(place)))
    (place / "tasks" / "functions.py").write_text(FUNCTIONS)
    return place


@pytest.fixture(autouse=True)
def _cached_here(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def by_metric(path):
    return {(row["task"], row["metric"]): row for row in json.loads(path.read_text())["results"]}


@pytest.fixture
def command_line(monkeypatch):
    """Runs lm-eval's own command line; its results. It indexes its thousands of files once."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks import TaskManager

    known, read = {}, TaskManager._get_task_and_group

    def once(self, directory):
        if directory not in known:
            known[directory] = read(self, directory)
        return dict(known[directory])

    monkeypatch.setattr(TaskManager, "_get_task_and_group", once)

    def start(output, *words):
        monkeypatch.setattr(sys, "argv", ["lm_eval", *map(str, words), "--output_path", str(output)])
        cli_evaluate()
        (path,) = output.rglob("results*.json")
        return json.loads(path.read_text())["results"]

    return start


def test_figures_are_those_of_lm_evals_own_command_line(place, capsys, tmp_path, command_line):
    names = "tiny_choices", "tiny_answers", "tiny_texts"
    code, _, err = run(
        capsys, "eval", place / "adapter", "--base", place / "base", "--tasks", *names,
        "--include-path", place / "tasks", "--batch-size", 2, "--output", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, err
    ours = by_metric(tmp_path / "r.json")
    for side, peft in (("base", ""), ("adapter", f",peft={place / 'adapter'}")):
        theirs = command_line(
            tmp_path / side, "--model", "hf", "--model_args", f"pretrained={place / 'base'},dtype=float32{peft}",
            "--device", "cpu", "--tasks", ",".join(names), "--include_path", place / "tasks", "--batch_size", 2,
        )  # fmt: skip
        for task, metric in (
            ("tiny_choices", "acc"), ("tiny_choices", "acc_norm"), ("tiny_answers", "chars"),
        ):  # fmt: skip
            row = ours[task, metric][side]
            assert row["value"] == pytest.approx(theirs[task][f"{metric},none"], abs=1e-12)
            assert row["stderr"] == pytest.approx(theirs[task][f"{metric}_stderr,none"], abs=1e-12)
        perplexity = ours["tiny_texts", "word_perplexity"][side]["value"]
        assert perplexity == pytest.approx(theirs["tiny_texts"]["word_perplexity,none"], rel=1e-4)
    assert ours["tiny_texts", "word_perplexity"]["difference"]["value"] != 0


def test_papers_protocols_run_on_local_rows(place, capsys, tmp_path):
    code, _, err = run(
        capsys, "eval", place / "adapter", "--base", place / "base", "--tasks", "paper_gsm8k", "paper_humaneval",
        "--data", f"paper_gsm8k={place / 'answers.jsonl'}", f"paper_humaneval={place / 'programs.jsonl'}",
        "--limit", 3, "--max-new-tokens", 4, "--run-generated-code", "--output", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, err
    rows = by_metric(tmp_path / "r.json")
    assert rows["paper_gsm8k", "accuracy"]["documents"] == 3
    assert rows["paper_gsm8k", "accuracy"]["difference"] == {"value": 0.0, "stderr": 0.0}
    assert rows["paper_humaneval", "pass_at_1"]["base"] == {"value": 0.0, "stderr": None}
    assert ("paper_gsm8k", "distinct_1") in rows


def test_a_model_that_knows_the_answer_scores(place, capsys, tmp_path, monkeypatch):
    """From the task file to the table: right answers are counted as such, each document by its own."""
    from lm_eval.models.huggingface import HFLM

    said = {
        "paper_gsm8k": " It is 2. The answer is: 2",
        "paper_humaneval": "```python\ndef add(a, b):\n    return a + b\n```",
    }

    def generate(self, requests, **_):
        return [said[request.task_name] for request in requests]

    monkeypatch.setattr(HFLM, "generate_until", generate)
    code, _, err = run(
        capsys, "eval", "--base", place / "base", "--tasks", "paper_gsm8k", "paper_humaneval",
        "--data", f"paper_gsm8k={place / 'answers.jsonl'}", f"paper_humaneval={place / 'programs.jsonl'}",
        "--max-new-tokens", 4, "--run-generated-code", "--output", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, err
    rows = by_metric(tmp_path / "r.json")
    assert rows["paper_gsm8k", "accuracy"]["base"]["value"] == pytest.approx(1 / 5)
    assert rows["paper_humaneval", "pass_at_1"]["base"]["value"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "paper_gsm8k"], "--data paper_gsm8k=FILE names a file of its rows"),
        (
            ["--tasks", "paper_humaneval", "--data", "paper_humaneval={place}/programs.jsonl"],
            "write --run-generated-code to allow it",
        ),
        (["--tasks", "tiny_choices", "--data", "tiny_choices:dev={place}/choices.jsonl"], "has the splits test"),
        (["--tasks", "tiny_choices", "--data", "tiny_texts={place}/choices.jsonl"], "it is not among --tasks"),
        (["--tasks", "tiny_answers", "--data", "tiny_answers={place}/answers.jsonl"], "--data tiny_answers:train=FILE"),
        (["--tasks", "tiny_choices", "--apply-chat-template", "--tokenizer", "{place}/plain"], "no chat template"),
        (["--tasks", "paper_gsm8k", "--data", "paper_gsm8k={place}/answers.jsonl"], "write --max-new-tokens 256"),
    ],
)  # fmt: skip
def test_what_a_task_lacks_is_named(arguments, said, place, capsys):
    if "--tokenizer" in arguments:
        plain = character_tokenizer()
        plain.chat_template = None
        plain.save_pretrained(place / "plain")
    words = [word.format(place=place) for word in arguments]
    line = refused(capsys, "eval", "--base", place / "base", "--include-path", place / "tasks", *words)
    assert said in line


def test_a_misspelt_task_is_named_with_its_likeness(place, capsys):
    line = refused(capsys, "eval", "--base", place / "base", "--tasks", "paper_gsm8")
    assert "there is no such task" in line and "did you mean" in line and "paper_gsm8k" in line
