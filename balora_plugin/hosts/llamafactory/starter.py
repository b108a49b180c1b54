"""The starter YAML for LLaMA-Factory; imports nothing heavy."""

from __future__ import annotations

from ...config import RECOMMENDED, RECOMMENDED_RATE

_STARTER = """\
# BA-LoRA with LLaMA-Factory: balora llamafactory train {name}
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
template: qwen
# quantization_bit: 4                # a quantised base

ba_lora:                             # docs/choose.md says when to write what
{terms}

stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_alpha: 16                       # alpha = r, as in the paper; LLaMA-Factory's own default is 2 r
lora_target: all
pissa_init: true                     # the start of the paper; false: the ordinary one
pissa_iter: -1                       # 16, LLaMA-Factory's default, is the faster and rougher pissa_fast

dataset: llamafactory/alpaca_en      # a data set of the hub; of your own: a name in dataset_info.json
dataset_dir: ONLINE                  # of your own: the folder that holds dataset_info.json
max_samples: 1000                    # for a first run
cutoff_len: 1024
packing: true
neat_packing: true

output_dir: outputs/ba-lora          # one for each run
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
num_train_epochs: 1.0
learning_rate: {rate}              # a PiSSA start wants less than a LoRA's 2e-4 (docs/choose.md)
lr_scheduler_type: cosine
warmup_ratio: 0.03
bf16: true
logging_steps: 10
save_steps: 500
report_to: none
"""


def llamafactory_starter(name: str) -> str:
    """Returns the starter YAML for a file of this name."""
    terms = "\n".join(f"  {key}: {value:g}" for key, value in RECOMMENDED.items())
    return _STARTER.format(name=name, terms=terms, rate=f"{RECOMMENDED_RATE:.1e}")
