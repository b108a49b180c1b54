"""`axolotl ba-lora`: train a YAML without the plugins line, write a starter YAML, print the block's schema.

Axolotl finds subcommands by entry point but no plug-ins: its own `train` needs the `plugins:` line that `ba-lora train`
adds.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml

PLUGIN = "balora_plugin.BaLoraPlugin"

STARTER = """\
# BA-LoRA with Axolotl: axolotl train {name}
base_model: Qwen/Qwen2.5-0.5B        # any causal language model
# load_in_4bit: true                 # a quantised base, as with adapter: qlora

plugins:
  - balora_plugin.BaLoraPlugin       # Axolotl discovers no plug-ins by itself
adapter: ba_lora
lora_r: 16
lora_alpha: 16                       # alpha = r, as in the paper
lora_target_linear: true
# peft_init_lora_weights: pissa_fast # for large matrices: minutes instead of an hour

ba_lora:
  preset: paper                      # or iclr2026; every field below overrides it
  # lambda_consistency: 0.5          # stay close to the pre-trained model
  # lambda_diversity: 0.02           # keep the outputs diverse
  # lambda_svd: 0.02                 # concentrate the logits on their leading singular values

datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
val_set_size: 0.01
sequence_len: 1024
sample_packing: true
attn_implementation: sdpa            # or flash_attention_2; packing needs one of them

output_dir: ./outputs/ba-lora
micro_batch_size: 4
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_torch_fused
learning_rate: 2e-5
lr_scheduler: cosine
warmup_ratio: 0.03
weight_decay: 0.0
bf16: auto
gradient_checkpointing: true
logging_steps: 10
"""


@click.group("ba-lora")
def main() -> None:
    """BA-LoRA: train a YAML, write a starter, print the schema."""


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def train(config: Path, options: tuple[str, ...]) -> None:
    """Add the plugins line to CONFIG, write the result beside the output, and hand it to `axolotl train`."""
    resolved = write_resolved(config)
    click.echo(f"wrote {resolved}: use it for merge-lora, inference, evaluate and preprocess too")
    click.echo(f"axolotl train {resolved} {' '.join(options)}".rstrip())
    from axolotl.cli.main import cli

    cli.main(["train", str(resolved), *options], standalone_mode=False)


@main.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default=Path("ba_lora.yml"))
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def init(path: Path, force: bool) -> None:
    """Write a commented starter YAML to PATH."""
    if path.exists() and not force:
        raise click.ClickException(f"{path} exists: name another file, or pass --force.")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STARTER.format(name=path), encoding="utf-8")
    click.echo(f"wrote {path}; next: axolotl train {path}")


@main.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), required=False)
def schema(path: Path | None) -> None:
    """Write the JSON schema of a YAML with a ba_lora: block to PATH, for editors; without PATH print it."""
    from .args import BaLoraBlock

    block = BaLoraBlock.model_json_schema(ref_template="#/properties/ba_lora/$defs/{model}")
    text = json.dumps({"type": "object", "properties": {"ba_lora": block}}, indent=2)
    if path is None:
        click.echo(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")
        click.echo(f"wrote {path}")


def write_resolved(config: Path) -> Path:
    """CONFIG with the plugins line, written as `ba_lora_config.yml` into its output directory."""
    values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise click.ClickException(f"{config} is no YAML mapping of keys to values.")
    plugins = list(values.get("plugins") or [])
    values["plugins"] = plugins if PLUGIN in plugins else [*plugins, PLUGIN]
    output = Path(values.get("output_dir") or "./model-out")
    output.mkdir(parents=True, exist_ok=True)
    resolved = output / "ba_lora_config.yml"
    resolved.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return resolved
