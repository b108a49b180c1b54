"""Two optimizer steps under DDP or alone, for test_distributed.py: ranks do not change the gradients."""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, RegularizerConfig
from tests.models import character_tokenizer, tiny_llama

ROWS = [{"prompt": f"What is {i} + {i}? ", "completion": f"It is {2 * i}" + " ok then" * (i % 4)} for i in range(8)]


class Keep(TrainerCallback):
    """Remembers the gradients of the first optimizer step."""

    gradients: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if not state.global_step:
            self.gradients = {
                name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
            }


def main(output: str, batch: int, accumulation: int, directory: str, cache: str | None = None) -> None:
    """Trains two steps on eight samples a step and stores gradients, logs, teacher passes and the adapter (rank 0)."""
    torch.set_num_threads(1)
    keep = Keep()
    trainer = BaLoraSFTTrainer(
        model=tiny_llama(),
        args=SFTConfig(
            output_dir=directory,
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            logging_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        processing_class=character_tokenizer(),
        callbacks=[keep],
        peft_config=BaLoraConfig(
            r=4,
            lora_alpha=4,
            target_modules="all-linear",
            regularizers=RegularizerConfig(
                lambda_consistency=0.5, lambda_diversity=0.1, lambda_svd=0.0, teacher_cache=cache
            ),
        ),
    )
    trainer.train()
    result = trainer.evaluate()
    trainer.save_model(directory)
    if trainer.accelerator.is_main_process:
        runs = trainer._ba_lora_cache.runs if cache else None
        logs = [{k: v for k, v in row.items() if k == "loss" or "balora" in k} for row in trainer.state.log_history]
        torch.save({"gradients": keep.gradients, "logs": logs, "eval": result, "runs": runs}, output)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
