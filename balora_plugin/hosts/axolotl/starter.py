"""The starter YAML and its JSON schema, which editors read; imports nothing heavy."""

from __future__ import annotations

import json

from ...config import RECOMMENDED
from .block import BaLoraBlock
from .migrate import PLUGIN, START, rate_in_yaml

_WHY = {
    "lambda_consistency": "stay close to the pre-trained model; 0.1 to 1: more is closer",
    "lambda_diversity": "keep the outputs diverse; 0: off",
    "lambda_svd": "concentrate the logits on their leading singular values; 0: off",
}

_STARTER = """\
# yaml-language-server: $schema={schema}
# BA-LoRA with Axolotl: axolotl train {name}
base_model: Qwen/Qwen2.5-0.5B        # any causal language model
# load_in_4bit: true                 # a quantised base, as with adapter: qlora

plugins:
  - {plugin}       # Axolotl discovers no plug-ins by itself
adapter: ba_lora
lora_r: 16
lora_alpha: 16                       # alpha = r, as in the paper
lora_target_linear: true
peft_init_lora_weights: {start}   # minutes on large models; pissa_exact, the SVD, is many times slower

ba_lora:                             # docs/choose.md says when to write what
{terms}

datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
val_set_size: 0.01
sequence_len: 1024
sample_packing: true
attn_implementation: sdpa            # or flash_attention_2; packing needs one of them

output_dir: ./outputs/ba-lora        # one for each run
micro_batch_size: 4
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_torch_fused
learning_rate: {rate}              # a PiSSA start wants less than a LoRA's 2e-4 (docs/choose.md)
lr_scheduler: cosine
warmup_ratio: 0.03
weight_decay: 0.0
bf16: auto
gradient_checkpointing: true
logging_steps: 10
"""


def starter(name: str, schema_file: str) -> str:
    """Returns the starter YAML for a file of this name, whose editor takes the schema from `schema_file`."""
    terms = [f"  {key}: {value:g}".ljust(37) + f"# {_WHY[key]}" for key, value in RECOMMENDED.items()]
    return _STARTER.format(
        name=name,
        schema=schema_file,
        plugin=PLUGIN,
        start=START,
        terms="\n".join(terms),
        rate=rate_in_yaml(),
    )


def schema() -> str:
    """Returns the JSON schema of a YAML with a ba_lora: block, as text: of the block every key, of the rest none."""
    block = BaLoraBlock.model_json_schema(ref_template="#/properties/ba_lora/$defs/{model}")
    block["additionalProperties"] = False  # pydantic refuses them too, by a validator that its schema does not show
    return json.dumps({"type": "object", "properties": {"ba_lora": block}}, indent=2)
