"""ms-swift's own training code, in this process (imports are slow): a command line, and its trainer."""

from __future__ import annotations

import json
from pathlib import Path

from swift.pipelines.train.sft import SwiftSft

from balora_plugin.hosts.swift.names import PLUGIN_FILE

TERMS = {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02, "share_interval": 0}
OFF = {"lambda_consistency": 0.0, "lambda_diversity": 0.0, "lambda_svd": 0.0}


class Run(SwiftSft):
    """`swift sft`, which keeps its trainer."""

    def train(self, trainer):
        self.trainer = trainer
        return super().train(trainer)


def defaults(workspace, out):
    """The YAML that every test begins with, as a dictionary."""
    return {
        "model": str(workspace / "base"),
        "model_type": "llama",
        "template": "chatml",
        "external_plugins": [str(PLUGIN_FILE)],
        "tuner_type": "ba_lora",
        "lora_rank": 4,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "dataset": [str(workspace / "data.jsonl")],
        "split_dataset_ratio": 0.2,
        "output_dir": str(out),
        "add_version": False,
        "max_steps": 3,
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_steps": 100,
        "eval_strategy": "no",
        "torch_dtype": "float32",
        "check_model": False,
        "report_to": "none",
        "dataloader_num_workers": 0,
        "use_hf": True,
        "use_cpu": True,
    }


def command_line(values):
    """ms-swift's way to make a command line of a YAML; None leaves a key out."""
    words = []
    for key, value in values.items():
        if value is not None:
            words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]


def write_workspace(path: Path, base, tokenizer):
    base.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} + {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}" + " ok" * (i % 3)},
            ]
        }
        for i in range(20)
    ]
    (path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labelled = [{"messages": [row["messages"][0]], "label": index % 3} for index, row in enumerate(rows)]
    (path / "labelled.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    return path
