"""Two optimizer steps under DDP or alone, for test_distributed.py: ranks do not change the gradients."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, RegularizerConfig, get_ba_lora_model
from integration.histories import rows_of
from tests.models import character_tokenizer, tiny_llama

ROWS = [{"prompt": f"What is {i} + {i}? ", "completion": f"It is {2 * i}" + " ok then" * (i % 4)} for i in range(8)]
ANCHORS = [f"Anchor {i} says little" + " at all" * (i % 4) for i in range(20)]

GRAPHS: list[Any] = []


class Keep(TrainerCallback):
    """Remembers the gradients of the first optimizer step."""

    gradients: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if not state.global_step:
            self.gradients = {
                name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
            }


def arguments(batch: int, accumulation: int, directory: str) -> dict[str, Any]:
    return {
        "output_dir": directory,
        "max_steps": 2,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def peft_config(cache: str | None) -> BaLoraConfig:
    """`cache`: a directory, perhaps with :K for `teacher_cache_top_k`; "": none; None: none, but anchors and weights
    that set themselves."""
    more = cache is None
    cache, _, top_k = (cache or "").partition(":")
    kept: dict[str, Any] = {"teacher_cache": cache or None, "teacher_cache_top_k": int(top_k) if top_k else None}
    if more:
        kept |= {"anchor_data": ANCHORS, "anchor_fraction": 0.4}  # 3.2 rows a step, some on each rank
        kept |= {"drift_target": 0.05, "temperature": 2.0, "balance": {"diversity": 0.1}}
    terms = RegularizerConfig(lambda_consistency=0.5, lambda_diversity=0.1, lambda_svd=0.0, **kept)
    return BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", regularizers=terms)


def trl_trainer(args: dict[str, Any], keep: Keep, cache: str | None) -> Trainer:
    from trl import SFTConfig

    return BaLoraSFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(**args),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        processing_class=character_tokenizer(),
        callbacks=[keep],
        peft_config=peft_config(cache),
    )


def compiled_trainer(args: dict[str, Any], keep: Keep, cache: str | None) -> Trainer:
    """TRL's with `compile=True`, autograd's tracing alone below our backend: compiling C++ takes most of a minute."""
    from torch._dynamo.backends.debugging import aot_eager

    from balora_plugin.compile import backend

    def lower(module: Any, inputs: Any, options: Any) -> Any:
        GRAPHS.append(module)
        return aot_eager(module, inputs)

    backend.lower = lower
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000  # several buckets, at which dynamo would cut the graphs
    compiling = {"torch_compile": True, "torch_compile_backend": "ba_lora", "gradient_checkpointing": True}
    return trl_trainer({**args, **compiling, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, keep, cache)


def axolotl_trainer(args: dict[str, Any], keep: Keep, cache: str | None) -> Trainer:
    """The trainer that the plug-in gives Axolotl, with the argument that Axolotl's builder sets against us."""
    from axolotl.core.training_args import AxolotlTrainingArguments

    from balora_plugin.hosts.axolotl.trainer import AxolotlBaLoraTrainer

    tokenizer = character_tokenizer()
    rows = []
    for row in ROWS:
        prompt, ids = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
        ids = [*ids, tokenizer.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return AxolotlBaLoraTrainer(
        model=get_ba_lora_model(tiny_llama(), peft_config(cache)),
        args=AxolotlTrainingArguments(**args, average_tokens_across_devices=False, remove_unused_columns=True),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        eval_data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[keep],
    )


def main(output: str, batch: int, accumulation: int, directory: str, host: str, cache: str | None = None) -> None:
    """Trains two steps on eight samples a step and stores gradients, logs, teacher passes and the adapter (rank 0)."""
    torch.set_num_threads(1)
    keep = Keep()
    build = {"trl": trl_trainer, "axolotl": axolotl_trainer, "compiled": compiled_trainer}[host]
    trainer = build(arguments(batch, accumulation, directory), keep, cache)
    trainer.train()
    result = trainer.evaluate()
    trainer.save_model(directory)
    weights = trainer.state.stateful_callbacks.get("ba_lora_weights")
    everywhere = gather_object([weights])
    assert all(each == weights for each in everywhere)  # to the bit
    assert "compile" not in trainer.ba_lora_run.warn.said  # nothing fell back
    if trainer.accelerator.is_main_process:
        runs = trainer.ba_lora_run.cache.runs if cache else None
        logs = rows_of(trainer.state.log_history)
        found = {"gradients": keep.gradients, "logs": logs, "eval": result, "runs": runs, "graphs": len(GRAPHS)}
        found["weights"] = weights
        torch.save(found, output)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
