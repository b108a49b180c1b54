"""Fine-tunes one model without the term and at two budgets, and says how far off each budget the drift was.

    python -m studies.drift_target --model HuggingFaceTB/SmolLM2-135M-Instruct --data gsm8k_train.jsonl --name SmolLM2

A run's drift is the mean over its last third of what each step measured on the tokens (samples) that it trained on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig

from .data import labelled_rows, language_rows, read

OFF = 1e-9  # of lambda_consistency: the term is measured and does not act
HEADER = """\
# Is a budget for drift held?

Each model is fine-tuned without the consistency term, and with `drift_target` at budgets of half and a quarter of the
drift that this run had (in nats per token, or per sample of a classifier; KL from the pre-trained model, T = 1). What
was held is the mean over the last third of the steps, on what each step trained on. One seed each; nothing was tuned
for it. Single steps, of batches that differ, lie between 0.6 and 1.6 of the budget ([runs.json](runs.json) has each).

| model | drift without the term | budget | drift held | off by | lambda at the end | task loss, without the term |
|---|---|---|---|---|---|---|
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m studies.drift_target", description=__doc__.partition("\n")[0])
    add = result.add_argument
    add("--model", required=True, help="directory or hub id")
    add("--data", type=Path, required=True, help="JSONL: text, or a prompt and a completion; with --classes a label")
    add("--classes", type=int, default=0, help="train a classifier of so many classes; 0: a language model")
    add("--budgets", type=float, nargs="+", help="in nats; left out: half and a quarter of the drift without the term")
    add("--steps", type=int, default=120)
    add("--batch", type=int, default=4, help="rows of a step")
    add("--length", type=int, default=96, help="tokens of a row, at most")
    add("--rank", type=int, default=16)
    add("--learning-rate", type=float, default=3e-4, help="falls to 0 linearly")
    add("--preset", default="paper")
    add("--seed", type=int, default=0)
    add("--name", help="of the model in the table; left out: the last part of --model")
    add("--output", type=Path, default=Path(__file__).parent, help="folder of runs.json and report.md, of all models")
    return result


def fine_tune(options: argparse.Namespace, terms: RegularizerConfig) -> list[dict[str, float]]:
    """The log of each step of one run."""
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = read(options.data, options.steps * options.batch)
    model: Any
    if options.classes:
        model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=options.classes)
        data, collator = labelled_rows(rows, tokenizer, options.length), DataCollatorWithPadding(tokenizer)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        data, collator = language_rows(rows, tokenizer, options.length), DataCollatorForSeq2Seq(tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        trainer = BaLoraTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=directory,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                learning_rate=options.learning_rate,
                warmup_steps=options.steps // 20,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                seed=options.seed,
                disable_tqdm=True,
            ),
            train_dataset=data,
            data_collator=collator,
            peft_config=BaLoraConfig(
                r=options.rank, lora_alpha=options.rank, target_modules="all-linear", regularizers=terms
            ),
        )
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def last_third(log: list[dict[str, float]], key: str) -> float:
    """Mean of a key over the last third of the steps."""
    values = [entry[key] for entry in log[-(len(log) // 3) :]]
    return sum(values) / len(values)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The run without the term, and one a budget."""
    off = RegularizerConfig(preset=options.preset, consistency="kl", temperature=1.0, lambda_consistency=OFF)
    free = fine_tune(options, off)
    reached = last_third(free, "balora/consistency")
    budgets = options.budgets or [float(f"{reached * part:.2g}") for part in (0.5, 0.25)]
    runs = []
    for budget in budgets:
        log = fine_tune(options, RegularizerConfig(preset=options.preset, drift_target=budget))
        held = last_third(log, "balora/drift")
        steps = {
            short: [round(entry[f"balora/{key}"], 6) for entry in log]
            for short, key in (("drift", "drift"), ("lambda", "lambda_consistency"), ("task", "task"))
        }
        runs.append({"budget": budget, "drift": held, "task": last_third(log, "balora/task"), "steps": steps})
        print(f"budget {budget:g}: drift {held:.4g}, off by {held / budget - 1:+.1%}", flush=True)
    given = {key: value for key, value in vars(options).items() if key not in ("output", "model", "data")}
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    free_run = {"drift": reached, "task": last_third(free, "balora/task")}
    return {"options": given, "data": options.data.name, "versions": versions, "free": free_run, "runs": runs}


def report(results: dict[str, Any]) -> str:
    """All models as one table."""
    lines = []
    for name, found in results.items():
        for run in found["runs"]:
            off = run["drift"] / run["budget"] - 1
            cells = (name, f"{found['free']['drift']:.3g}", f"{run['budget']:g}", f"{run['drift']:.3g}", f"{off:+.1%}")
            task = f"{run['task']:.3f}, {found['free']['task']:.3f}"
            lines.append(f"| {' | '.join(cells)} | {run['steps']['lambda'][-1]:.3g} | {task} |\n")
    commands = "".join(f"    {command(found)}\n" for found in results.values())
    versions = {words(found["versions"]) for found in results.values()}
    return f"{HEADER}{''.join(lines)}\n{'; '.join(sorted(versions))}. Repeat a model with\n\n{commands}"


def words(versions: dict[str, str]) -> str:
    """Versions as text."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def command(found: dict[str, Any]) -> str:
    """The command of one model's runs; what is as by default is left out."""
    given = {key: value for key, value in found["options"].items() if value != parser().get_default(key)}
    options = " ".join(f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in given.items())
    return f"python -m studies.drift_target --model MODEL --data {found['data']} {options}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one model and writes the table of all that were run."""
    options = parser().parse_args(arguments)
    options.name = options.name or Path(options.model).name
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "runs.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    results[options.name] = measure(options)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_name("report.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
