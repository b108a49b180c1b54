"""First gradient norms and held-out loss by start and learning rate: `python -m benchmarks.first_norms`

Without --model the quickstart's tiny model is trained (pre-trained once, in .cache); any causal language model with a
tokenizer works. The data are the quickstart's pairs, made of the standard library's docstrings. Without terms.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from balora_plugin import BaLoraConfig, get_ba_lora_model
from studies.quickstart.corpus import Instruction, build_corpus, collect_docstrings
from studies.quickstart.settings import PretrainingSettings
from studies.quickstart.tiny_model import base_model

from .measuring import quiet

CLIP = 1.0  # transformers' max_grad_norm
FIRST = 5
RATES = {"lora": (2e-4, 1e-3), "pissa": (2e-5, 5e-5, 2e-4, 1e-3)}


def batches(pairs: Sequence[Instruction], tokenizer: Any, rows: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches of `rows` pairs, cut to `length` tokens; the completions' tokens are the labels."""
    made = []
    for begin in range(0, len(pairs) - rows + 1, rows):
        encoded = []
        for pair in pairs[begin : begin + rows]:
            prompt = tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
            ids = [*prompt, *tokenizer(pair.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            encoded.append((ids[:length], ([-100] * len(prompt) + ids[len(prompt) :])[:length]))
        width = max(len(ids) for ids, _ in encoded)
        made.append(
            {
                "input_ids": torch.tensor([ids + [tokenizer.eos_token_id] * (width - len(ids)) for ids, _ in encoded]),
                "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in encoded]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in encoded]),
            }
        )
    return made


def adapted(folder: Path, start: str, rank: int) -> Any:
    """The model with an adapter on every linear layer but the head, alpha = rank; `start`: lora or pissa."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if start == "lora":
        return get_peft_model(model, LoraConfig(**shape))
    return get_ba_lora_model(model, BaLoraConfig(**shape, init_lora_weights="pissa_fast"))


def train(model: Any, data: Sequence[dict[str, torch.Tensor]], rate: float) -> list[float]:
    """One AdamW step a batch at a constant rate, gradients clipped as by a Trainer; their norms before that."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    norms = []
    for batch in data:
        model(**batch).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


@torch.no_grad()
def held_out_loss(model: Any, data: Sequence[dict[str, torch.Tensor]]) -> float:
    """Mean loss of a batch, in nats per counted token."""
    return statistics.mean(float(model(**batch).loss) for batch in data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a directory; the quickstart's tiny model without")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    corpus = build_corpus(collect_docstrings())
    folder = options.model
    if folder is None:
        cache = Path(".cache/quickstart")
        folder = base_model(cache, corpus.pretraining, corpus.fingerprint(), PretrainingSettings()).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = batches(corpus.train[: options.rows * options.steps], tokenizer, options.rows, options.length)
    held_out = batches(corpus.held_out[: 4 * options.rows], tokenizer, options.rows, options.length)
    print(f"rank {options.rank}, {options.steps} steps of {options.rows} rows, clipped to {CLIP:g}; held-out loss")
    print("| start | learning rate | first norm | median of five | before | after |")
    print("|---|---|---|---|---|---|")
    for start, rates in RATES.items():
        for rate in rates:
            model = adapted(folder, start, options.rank)
            before = held_out_loss(model.eval(), held_out)
            norms = train(model.train(), data, rate)
            after = held_out_loss(model.eval(), held_out)
            median = statistics.median(norms[:FIRST])
            print(f"| {start} | {rate:g} | {norms[0]:.2f} | {median:.2f} | {before:.3f} | {after:.3f} |", flush=True)


if __name__ == "__main__":
    main()
