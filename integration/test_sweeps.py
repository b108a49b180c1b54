"""Sweeps by existing engines, on the tiny model: Axolotl's own, and the Trainer's with Optuna; one table of both."""

from __future__ import annotations

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from models import character_tokenizer, tiny_llama

from balora_plugin.report.runs import read_runs
from studies.sweeps.__main__ import main
from studies.sweeps.together import points

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "example_configs"
SWEEPS = sorted((EXAMPLES / "paper" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_the_papers_sweeps_is_valid(path, monkeypatch):
    pytest.importorskip("axolotl")
    from axolotl.cli.utils.sweeps import generate_sweep_configs

    from . import yaml_survey
    from .configs.bases import config_of

    monkeypatch.setattr(yaml_survey, "config_of", config_of)
    base = yaml.safe_load((EXAMPLES / "paper" / "llama2-7b.yaml").read_text(encoding="utf-8"))
    made = generate_sweep_configs(base, yaml.safe_load(path.read_text(encoding="utf-8")))
    assert len({json.dumps(values, sort_keys=True) for values in made}) == len(made)
    with yaml_survey.pretended(ROOT):
        for values in made[:6]:
            cfg = yaml_survey.validated(values)
            assert cfg.ba_lora and cfg.datasets[0].path == values["datasets"][0]["path"]


@pytest.mark.skipif(find_spec("axolotl") is None, reason="needs Axolotl")
def test_axolotls_sweep_and_the_table(written, tmp_path, capsys):
    """The example's sweep over a small YAML: Axolotl writes the runs' YAMLs, each is trained as by `axolotl train`."""
    from axolotl.cli.utils.train import generate_config_files

    from .axolotl_run import run

    sweep = yaml.safe_load((EXAMPLES / "sweeps" / "quickstart.yaml").read_text(encoding="utf-8"))
    few = {"ba_lora": sweep["ba_lora"][1:], "_": sweep["_"][:2]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(few))
    path = written(
        max_steps=2, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, val_set_size=4
    )
    outputs = []
    for name, _ in generate_config_files(str(path), str(tmp_path / "sweep.yaml")):
        outputs.append(run(name).args.output_dir)
        Path(name).unlink()
    found = points(read_runs(outputs), "rank", "eval_loss")
    assert [(point.method, point.x) for point in found] == [(m, r) for m in ("ba_lora", "pissa") for r in (1, 4)]
    accuracies = {path: 40.0 + i for i, path in enumerate(outputs)}
    (tmp_path / "values.json").write_text(json.dumps(accuracies))
    told = ["--values", str(tmp_path / "values.json"), "--published", "gsm8k", "--y", "GSM8K"]
    main([*outputs, "--x", "rank", "--output", str(tmp_path / "together"), *told])
    said = capsys.readouterr().out
    assert "| published (LLaMA-2-7B, r 128) | 54.53 | 52.37 |" in said
    assert (tmp_path / "together" / "sweep.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        main([*outputs, "--published", "gsm8k"])
    with pytest.raises(ValueError, match=r"does not say its lambda_consistency|has no accuracy"):
        points(read_runs(outputs), "rank", "accuracy")


def test_optunas_search(tmp_path):
    pytest.importorskip("optuna")
    script = runpy.run_path(str(EXAMPLES / "sweeps" / "with_optuna.py"), run_name="script")
    tiny_llama().save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"What is {i} + {i}? ", "completion": f"It is {2 * i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    best = script["search"](
        str(tmp_path / "base"),
        *[str(tmp_path / "rows.jsonl")] * 2,
        trials=2,
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        disable_tqdm=True,
        **small,
    )
    assert best.hyperparameters.keys() == {"learning_rate", "rank", "lambda_consistency"}
    runs = read_runs([str(path) for path in sorted((tmp_path / "out").glob("run-*"))])
    assert len(runs) == 2
    found = points(runs, "lambda_consistency", "eval_loss")
    assert {point.method for point in found} == {"ba_lora"}
    assert min(point.y for point in found) == pytest.approx(best.objective)
    assert best.hyperparameters["lambda_consistency"] in [pytest.approx(point.x) for point in found]
