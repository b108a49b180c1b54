"""Learning rate, rank and lambda_consistency by the Trainer's own hyperparameter_search: pip install optuna, and

    make quickstart   (once: the tiny model and its data; or --base and --data, JSON lines of prompt and completion)
    python example_configs/sweeps/with_optuna.py --trials 8
    python -m studies.sweeps outputs/optuna/run-* --x learning_rate --output outputs/sweep

Rank and weight are no TrainingArguments, so `model_init`, which gets the trial, asks it for them. With Ray Tune it gets a
dictionary in the trial's place: backend="ray", and the same names in its hp_space.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig, get_ba_lora_model


def tokenised(path: str, tokenizer: Any) -> Dataset:
    """Returns rows of `prompt` and `completion` as tokens, the loss on the completion alone."""

    def one(row: dict[str, str]) -> dict[str, list[int]]:
        asked, said = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        said = [*said, tokenizer.eos_token_id]
        return {"input_ids": asked + said, "labels": [-100] * len(asked) + said}

    data = load_dataset("json", data_files=path, split="train")
    return data.map(one, remove_columns=data.column_names)


def search(base: str, data: str, held_out: str, **changes: Any) -> Any:
    """Searches; returns the best run. `changes`: `trials`, and training arguments."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    trials = changes.pop("trials", 8)

    def model_init(trial: Any) -> Any:
        rank, weight = 16, 0.3  # of the first model, which no trial asked for
        if trial is not None:
            rank = trial.suggest_categorical("rank", [1, 4, 16])
            weight = trial.suggest_float("lambda_consistency", 0.01, 1.0, log=True)
        terms = RegularizerConfig(lambda_consistency=weight, lambda_diversity=0.0, lambda_svd=0.0)
        config = BaLoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", regularizers=terms)
        return get_ba_lora_model(AutoModelForCausalLM.from_pretrained(base), config)

    values = {
        "output_dir": "outputs/optuna",
        "max_steps": 60,
        "per_device_train_batch_size": 16,
        "eval_strategy": "steps",
        "eval_steps": 60,
        "save_steps": 60,
        "logging_steps": 10,
        "report_to": [],
    }
    trainer = BaLoraTrainer(
        model_init=model_init,
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=tokenised(data, tokenizer),
        eval_dataset=tokenised(held_out, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    return trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        direction="minimize",
        n_trials=trials,
        backend="optuna",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="outputs/quickstart/base")
    parser.add_argument("--data", default="outputs/quickstart/train.jsonl")
    parser.add_argument("--held-out", default="outputs/quickstart/held_out.jsonl")
    parser.add_argument("--trials", type=int, default=8)
    options = parser.parse_args()
    print(search(options.base, options.data, options.held_out, trials=options.trials))
