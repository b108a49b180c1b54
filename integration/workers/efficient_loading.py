"""A base that transformers has loaded on rank 0 alone, for test_efficient_loading.py: its start, and what is refused.

FSDP's cpu_ram_efficient_loading: transformers 5.16 leaves the other ranks zeros, which are no meta tensors.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig, get_ba_lora_model


def loaded(base: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    if dist.get_rank():
        with torch.no_grad():  # a release that has read them here too
            for parameter in model.parameters():
                parameter.zero_()
    return model


def refusal(base: str, directory: str, **given: Any) -> str:
    """What a trainer that is made of such models says."""
    terms = RegularizerConfig(lambda_consistency=0.5, **given.pop("terms", {}))
    args = TrainingArguments(directory, use_cpu=True, report_to=[])
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    try:
        BaLoraTrainer(loaded(base), args, train_dataset=rows, regularizers=terms, **given)
    except ValueError as error:
        return str(error)
    return ""


def main(base: str, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    dist.init_process_group("gloo")
    model: nn.Module = get_ba_lora_model(loaded(base), BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if "frozen_" in name}
    save_file(frozen, os.path.join(directory, f"frozen-{dist.get_rank()}.safetensors"))
    for key in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        del os.environ[key]  # accelerate gives a CPU no FSDP
    said = refusal(base, directory, teacher_model=loaded(base))
    assert "teacher_model=LlamaForCausalLM is loaded on one process alone" in said, said
    said = refusal(base, directory, terms={"teacher_cache": os.path.join(directory, "cache")})
    assert "teacher's weights on every process" in said, said


if __name__ == "__main__":
    main(*sys.argv[1:])
