"""`balora compare` from a file of twenty rows to the report, and `balora report` on what it leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from models import character_tokenizer, tiny_llama
from peft import PeftModel

from balora_plugin.commands import main
from balora_plugin.compare import cells
from balora_plugin.compare.plan import Cell, GridSettings, terms_from
from balora_plugin.config import RECOMMENDED, RegularizerConfig
from balora_plugin.export.lora_file import read_adapter
from balora_plugin.report.groups import grouped
from balora_plugin.report.runs import Run, read_runs
from balora_plugin.report.updates import spectra_of
from balora_plugin.samples.jsonl import read_samples
from balora_plugin.samples.split import split

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Arguments of a comparison of two methods on twenty rows, that has run once."""
    root = tmp_path_factory.mktemp("compare")
    tiny_llama().save_pretrained(root / "model")
    character_tokenizer().save_pretrained(root / "model")
    rows = [{"prompt": f"what is {n} and {n}? ", "completion": f"it is {2 * n}."} for n in range(20)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "questions.txt").write_text("what is 3 and 3? \n")
    arguments = ["compare", "--model", root / "model", "--data", root / "rows.jsonl", "--output", root / "out"]
    arguments += ["--methods", "lora", "full", "--rates", "3e-3", "--steps", "4", "--batch", "4", "--rank", "2"]
    arguments += ["--prompts", root / "questions.txt"]
    assert main(arguments) == 0
    return root, arguments


def test_results_are_those_of_the_saved_models(twenty):
    root, _ = twenty
    results = json.loads((root / "out" / "results.json").read_text())
    assert results["rows"] == {"train": 16, "held_out": 4}
    lora = next(cell for cell in results["cells"] if cell["method"] == "lora")
    run = next(each for each in (root / "out" / "runs").iterdir() if each.name.startswith("lora"))
    base = tiny_llama().eval()
    model = PeftModel.from_pretrained(tiny_llama(), str(run)).eval()
    tokenizer = character_tokenizer()
    _, held_out = split(read_samples(str(root / "rows.jsonl")), 0.2)
    for place, row in enumerate(held_out.rows):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            after, before = (each(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() for each in (model, base))
        targets = ids[0, len(prompt) :]
        loss = torch.nn.functional.cross_entropy(after, targets, reduction="sum")
        p = before.log_softmax(-1)
        drift = (p.exp() * (p - after.log_softmax(-1))).sum()
        assert lora["rows"]["count"][place] == len(targets)
        assert lora["rows"]["loss"][place] == pytest.approx(float(loss), rel=1e-4)
        assert lora["rows"]["drift"][place] == pytest.approx(float(drift), rel=1e-2)
    for cell in results["cells"]:
        rows = cell["rows"]
        assert cell["final"]["loss"] == pytest.approx(sum(rows["loss"]) / sum(rows["count"]), rel=1e-4)
        assert cell["final"]["balora/drift"] == pytest.approx(sum(rows["drift"]) / sum(rows["count"]), rel=1e-3)
        assert cell["final"]["balora/drift"] > 0


def test_twenty_rows_are_said_to_be_few(twenty):
    root, _ = twenty
    text = (root / "out" / "results.md").read_text()
    assert "4 held-out rows" in text and "One seed" in text and re.search(r"\| full \| lora \| loss \| -", text)


def test_a_finished_cell_is_not_run_again(twenty, monkeypatch, capsys):
    root, arguments = twenty
    before = (root / "out" / "results.json").read_text()

    def never(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(cells, "train_cell", never)
    assert main(arguments) == 0
    assert (root / "out" / "results.json").read_text() == before
    assert capsys.readouterr().err.count(": kept") == 2
    assert main([*arguments, "--seeds", "1"]) == 2  # another seed is another cell
    assert "trained again" in capsys.readouterr().err


def test_the_model_before_is_the_table_s_first_row(twenty):
    root, _ = twenty
    results = json.loads((root / "out" / "results.json").read_text())
    base, tokenizer, loss, count = tiny_llama().eval(), character_tokenizer(), 0.0, 0
    for row in split(read_samples(str(root / "rows.jsonl")), 0.2)[1].rows:
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = base(input_ids=ids).logits[0, prompt - 1 : -1]
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, prompt:], reduction="sum"))
        count += ids.shape[1] - prompt
    for cell in results["cells"]:
        assert cell["before"]["loss"] == pytest.approx(loss / count, rel=1e-4)
        assert cell["before"]["balora/drift"] == pytest.approx(0.0, abs=1e-6)
    first = (root / "out" / "results.md").read_text().splitlines()[2]
    assert first.startswith(f"| before | - | 1 | {loss / count:.4g} |")


def test_a_step_s_time_is_said_once(capsys):
    said, state = cells._progress(), SimpleNamespace(global_step=0, max_steps=12)
    for _ in range(4):
        said.on_step_begin(None, state, None)
        state.global_step += 1
        said.on_step_end(None, state, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.fullmatch(r"  \S+ s a step: 0 s more of them in this run", lines[0])


def test_lora_terms_is_loras_start_with_the_terms(tmp_path):
    recipe = GridSettings("m", steps=20, rank=4, batch=2, max_length=8, terms=terms_from(None, []), data="")
    adapter = cells._adapter(Cell("lora_terms", 1e-3, 0), recipe, "CAUSAL_LM")
    assert adapter.init_lora_weights is True and adapter.regularizers.lambda_consistency == 0.3
    settings = {"adapter": {"kind": "lora", "start": True, "r": 4}}
    assert Run("r", tmp_path, [], 1, settings, adapter.regularizers).method == "lora_terms"


def test_a_model_that_is_no_directory_is_refused_before_transformers_is_there(tmp_path):
    code = (
        "import sys; from balora_plugin.commands import main; "
        "code = main(['compare', '--model', './no', '--data', 'no', '--output', 'no']); "
        "sys.exit(code if 'transformers' not in sys.modules else 'imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "--model ./no is no directory here" in done.stderr


def test_a_report_of_the_whole_folder_is_pointed_to_its_runs(twenty, capsys):
    out = twenty[0] / "out"
    assert main(["report", out]) == 2
    assert f"{out}/report/report.html" in (said := capsys.readouterr().err) and f"balora report {out}/runs/*" in said


def test_the_terms_are_the_recommended_ones_unless_a_preset_is_named(twenty):
    root, _ = twenty
    terms = json.loads((root / "out" / "results.json").read_text())["recipe"]["terms"]
    assert {key: terms[key] for key in RECOMMENDED} == RECOMMENDED
    changed = terms_from(None, ["lambda_svd=0.1"])
    assert (changed.lambda_svd, changed.lambda_consistency) == (0.1, RECOMMENDED["lambda_consistency"])
    assert terms_from("iclr2026", []) == RegularizerConfig(preset="iclr2026")


def test_the_report_shows_both(twenty):
    root, _ = twenty
    text = (root / "out" / "report" / "report.html").read_text()
    for said in (
        "Drift against task loss",
        "Spectra of the logits",
        "Update: lora",
        "what is 3 and 3?",
        "4 held-out rows",
    ):
        assert said in text, said
    runs = read_runs([str(path) for path in sorted((root / "out" / "runs").iterdir())])
    assert [group.label for group in grouped(runs)] == ["lora", "full"]
    assert all(run.seed == 0 and run.curve("eval_balora/drift") for run in runs)


def test_the_spectra_are_those_of_the_update(twenty):
    root, _ = twenty
    run = next(run for run in read_runs([str(p) for p in (root / "out" / "runs").iterdir()]) if run.method == "lora")
    found = spectra_of(run)
    adapter = read_adapter(run.adapter)
    assert len(found.layers) == len(adapter.updates) == 14
    for name, update in adapter.updates.items():
        values = found.layers[name.removeprefix("base_model.model.").removeprefix("model.")]
        dense = torch.linalg.svdvals(update.scaling * update.b.double() @ update.a.double())[: len(values)]
        assert values == pytest.approx(dense.tolist(), rel=1e-6, abs=1e-9)


def test_report_takes_a_run_and_a_base(twenty, tmp_path, capsys):
    root, _ = twenty
    run = next(each for each in (root / "out" / "runs").iterdir() if each.name.startswith("lora"))
    asked = ["--base", root / "model", "--prompts", root / "questions.txt", "--output", tmp_path / "look"]
    assert main(["report", run, *asked]) == 0
    assert "Answers" in (tmp_path / "look" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--rates", "3"], "--rates 3: write learning rates"),
        (["--steps", "0"], "--steps 0: write a whole number"),
        (["--held-out", "1"], "--held-out 1: write a share"),
        (["--terms", "lambda_svd=-1"], "--terms lambda_svd=-1 must be"),
        (
            ["--terms", "lambda_sdv=1"],
            "--terms lambda_sdv is not a setting of RegularizerConfig: did you mean lambda_svd?",
        ),
        (["--terms", "lambda_svd"], "write key=value"),
        (["--terms", "head_warmup_steps=3"], "head_warmup_steps=3 with task='nlg'"),
        (["--data", "nowhere.jsonl"], "is no file"),
        (["--prompts", "nowhere.txt"], "is no file"),
        (["--model", "nowhere/at/all"], "--model nowhere/at/all is no directory here"),
        (["--model", "./nowhere"], "--model ./nowhere is no directory here"),
        (["--model", "nowhere-at-all"], "model nowhere-at-all has no tokenizer that loads"),
        (["--methods", "lora", "pisa"], "Did you mean pissa?"),
        (
            ["--terms", "lambda_svd=0.1,lambda_diversity=0.2"],
            "separate them by spaces: --terms lambda_svd=0.1 lambda_diversity=0.2",
        ),
    ],
)
def test_what_cannot_be_is_said_before_a_model_loads(changes, said, twenty, monkeypatch, capsys):
    _, arguments = twenty
    monkeypatch.setattr(cells, "train_cell", lambda *args: pytest.fail("a model was loaded"))
    assert main([*arguments, *changes]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "x"], "is asked nothing"),
        (["--data", "x"], "add --base MODEL"),
        (["--prompts", "x"], "add --base MODEL"),
    ],
)
def test_what_a_report_cannot_be_asked(words, said, tmp_path, capsys):
    assert main(["report", tmp_path, *words]) == 2
    assert said in capsys.readouterr().err


def test_classes_are_compared_and_drawn(tmp_path):
    from classifiers import classifier

    classifier(num_labels=2).save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": f"{'odd' if n % 2 else 'even'} {n}", "label": "odd" if n % 2 else "even"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["compare", "--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--methods", "ba_lora"]
    arguments += ["--output", tmp_path / "out", "--rates", "1e-3", "--steps", "2", "--batch", "8", "--rank", "2"]
    assert main(arguments) == 0
    cell = json.loads((tmp_path / "out" / "results.json").read_text())["cells"][0]
    assert {"accuracy", "macro_f1", "balora/drift", "balora/entropy"} <= cell["final"].keys()
    assert sum(cell["rows"]["count"]) == 4
    assert "Classes in the last layer: ba_lora" in (tmp_path / "out" / "report" / "report.html").read_text()
