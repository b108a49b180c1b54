"""bfloat16 adapters: the delta form beside stock PiSSA and float32. `python -m benchmarks.bf16`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from models import VOCABULARY, tiny_llama

from balora_plugin import BaLoraConfig, get_ba_lora_model

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def delta(base: nn.Module) -> nn.Module:
    return get_ba_lora_model(base, BaLoraConfig(**LORA), autocast_adapter_dtype=False)


def pissa(base: nn.Module) -> nn.Module:
    return get_peft_model(base, LoraConfig(**LORA, init_lora_weights="pissa"), autocast_adapter_dtype=False)


def final_loss(wrap: Callable[[nn.Module], nn.Module], dtype: torch.dtype, steps: int, rate: float) -> float:
    """Loss after `steps` AdamW steps on one batch, model and adapter in `dtype`."""
    model = wrap(tiny_llama().to(dtype))
    for p in model.parameters():
        p.data = p.data.to(dtype)
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for _ in range(steps + 1):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-4)
    options = parser.parse_args()
    print(f"tiny Llama, {options.steps} steps at {options.rate:g}, torch {torch.__version__}, peft {peft.__version__}")
    rows = [
        ("at the start, float32", delta, torch.float32, 0),
        ("delta form, float32", delta, torch.float32, options.steps),
        ("delta form, bfloat16", delta, torch.bfloat16, options.steps),
        ("stock PiSSA, float32", pissa, torch.float32, options.steps),
        ("stock PiSSA, bfloat16", pissa, torch.bfloat16, options.steps),
    ]
    for name, wrap, dtype, steps in rows:
        print(f"{name:24s} loss {final_loss(wrap, dtype, steps, options.rate):.4f}")


if __name__ == "__main__":
    main()
