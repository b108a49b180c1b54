"""The paper's YAMLs with TRL: python example_configs/paper/with_trl.py example_configs/paper/llama2-7b.yaml

--method full, lora, pissa or dora trains a baseline, --terms none, consistency, diversity or svd an ablation, as the
keys of the `ba_lora:` block do in Axolotl. Several GPUs:
accelerate launch --config_file example_configs/accelerate/fsdp2.yaml.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, RegularizerConfig
from balora_plugin.hosts.axolotl.method import spelled_out

# Axolotl's key -> TRL's
ARGUMENTS = {
    "output_dir": "output_dir",
    "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "num_epochs": "num_train_epochs",
    "max_steps": "max_steps",
    "optimizer": "optim",
    "learning_rate": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",  # below 1: a share of all steps
    "weight_decay": "weight_decay",
    "bf16": "bf16",
    "sequence_len": "max_length",
    "sample_packing": "packing",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "logging_steps": "logging_steps",
    "save_steps": "save_steps",
    "seed": "seed",
}
ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
}
READ_HERE = {"base_model", "special_tokens", "plugins", "adapter", "ba_lora", "datasets", "attn_implementation"}
SAID_OTHERWISE = {  # what TRL does by itself, or accelerate's own file says
    "train_on_inputs": False,
    "excess_length_strategy": "truncate",
    "fsdp_version": None,
    "fsdp_config": None,
}


def read(path: str, method: str | None = None, terms: str | None = None) -> dict[str, Any]:
    """Returns the YAML's values, with a method and terms of the command line in them.

    Raises:
        ValueError: a key that has no counterpart here, so that another run than the YAML's would be trained.
    """
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    asked = {key: value for key, value in (("method", method), ("terms", terms)) if value is not None}
    values = spelled_out({**values, "ba_lora": {**(values.get("ba_lora") or {}), **asked}})
    for key, value in values.items():
        expected = SAID_OTHERWISE.get(key, value)
        if key not in {*ARGUMENTS, *ADAPTER, *READ_HERE, *SAID_OTHERWISE} or expected not in (None, value):
            raise ValueError(f"{path}: {key}: {value!r} has no counterpart in this script: train it with Axolotl.")
    return values


def terms(values: dict[str, Any]) -> RegularizerConfig:
    """Returns the block's terms."""
    block = {key: value for key, value in values["ba_lora"].items() if key != "apply_to"}
    return RegularizerConfig.from_dict(block)


def adapter(values: dict[str, Any]) -> LoraConfig | None:
    """Returns the adapter: ours, PEFT's own for DoRA, None where every weight trains."""
    kind = {"ba_lora": BaLoraConfig, "lora": LoraConfig, None: None}[values.get("adapter")]
    if kind is None:
        return None
    chosen = {name: values[key] for key, name in ADAPTER.items() if key in values}
    return kind(task_type="CAUSAL_LM", **chosen)


def arguments(values: dict[str, Any], **changes: Any) -> SFTConfig:
    """Returns the YAML's training arguments, with `changes` in TRL's own names."""
    chosen = {name: values[key] for key, name in ARGUMENTS.items() if key in values}
    chosen["learning_rate"] = float(chosen["learning_rate"])  # YAML reads 2e-5 as a word
    chosen["model_init_kwargs"] = {
        "dtype": "bfloat16" if values.get("bf16") else "float32",
        "attn_implementation": values.get("attn_implementation", "sdpa"),
    }
    tokens = values.get("special_tokens") or {}
    return SFTConfig(**{"completion_only_loss": True, **chosen, **tokens, **changes})


def rows(values: dict[str, Any]) -> Dataset:
    """Returns the YAML's dataset as prompts and completions; a `path` that ends in .json or .jsonl is a local file."""
    (entry,) = values["datasets"]
    local = entry["path"].endswith((".json", ".jsonl"))
    named = {"path": "json", "data_files": entry["path"]} if local else {"path": entry["path"]}
    data = load_dataset(**named, split=entry.get("split", "train"))
    form = entry["type"]
    question, answer = form["field_instruction"], form["field_output"]
    return data.map(
        lambda row: {"prompt": form["format"].format(instruction=row[question]), "completion": row[answer]},
        remove_columns=data.column_names,
    )


def main() -> None:
    """Trains what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", help="a YAML of example_configs/paper/")
    parser.add_argument("--method", choices=("full", "lora", "pissa", "dora", "ba_lora"))
    parser.add_argument("--terms", choices=("none", "all", "consistency", "diversity", "svd"))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", help="in the place of the YAML's output_dir")
    options = parser.parse_args()
    values = read(options.file, options.method, options.terms)
    given = {"seed": options.seed, "output_dir": options.output}
    trainer = BaLoraSFTTrainer(
        model=values["base_model"],
        args=arguments(values, **{key: value for key, value in given.items() if value is not None}),
        train_dataset=rows(values),
        peft_config=adapter(values),
        regularizers=terms(values),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
