"""The starter YAML for ms-swift; imports nothing of it."""

from __future__ import annotations

from ...config import RECOMMENDED, RECOMMENDED_RATE
from .names import PLUGIN_FILE, TUNER, VARIABLE

_STARTER = """\
# BA-LoRA with ms-swift: swift sft {name}
# the same on several GPUs: NPROC_PER_NODE=2 swift sft {name}
ENV:
  {variable}:                     # docs/choose.md says when to write what
{terms}

model: Qwen/Qwen2.5-0.5B-Instruct
external_plugins:
  - {plugin}
tuner_type: {tuner}
lora_rank: 16
lora_alpha: 16                  # alpha = r, as in the paper
lora_dropout: 0.0
target_modules: [all-linear]
# quant_method: bnb             # a quantised base, with quant_bits: 4

dataset:
  - AI-ModelScope/alpaca-gpt4-data-en#2000
split_dataset_ratio: 0.01
max_length: 1024

output_dir: output/ba-lora
add_version: false              # checkpoints lie in output_dir itself
save_steps: 100
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
num_train_epochs: 1
learning_rate: {rate:.1e}          # a PiSSA start wants less than a LoRA's 2e-4 (docs/choose.md)
warmup_ratio: 0.03
weight_decay: 0.0
torch_dtype: bfloat16
logging_steps: 10
"""


def swift_starter(name: str) -> str:
    """Returns the starter YAML, with the plug-in's path on this machine, for a file of this name."""
    terms = "\n".join(f"    {key}: {value:g}" for key, value in RECOMMENDED.items())
    return _STARTER.format(
        name=name, variable=VARIABLE, terms=terms, plugin=PLUGIN_FILE, tuner=TUNER, rate=RECOMMENDED_RATE
    )
