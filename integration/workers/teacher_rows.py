"""Steps of ranks with other numbers of rows, every one meeting the teacher or one in four, for test_sharded.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from integration.workers.fsdp import ROWS, Keep, OwnUnit, adapted_layers, pass_as_gpus, sharding
from tests.models import character_tokenizer, tiny_llama

STEPS = 8  # two epochs of as many as the interval: each row meets the teacher twice, the second time all layers proven


class KeepAll(Keep):
    """The gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        self.steps.append(self.whole(model))


class SameRows(BaLoraTrainer):
    """Trains on the same rows in each step: five on the first rank, one on the second, whatever the loader gives."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, _ = super().get_batch_samples(*args, **kwargs)
        return batches, torch.tensor(sum(len(row["input_ids"]) - 1 for row in ROWS[:6]))

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        first = self.args.process_index == 0
        rows = ROWS[:5] if first else ROWS[5:6]
        fixed = DataCollatorForSeq2Seq(character_tokenizer())(rows)
        return super().training_step(model, dict(fixed), *args, **kwargs)


def mean_gradient(directory: str, kind: str, interval: int, layers: str, saved: str) -> dict[str, Any]:
    """Over the steps of a run whose weights stay as they are."""
    keep = KeepAll()
    terms = RegularizerConfig(
        lambda_consistency=0.5,
        lambda_diversity=0.0,
        lambda_svd=0.0,
        share_interval=1,
        teacher_interval=interval,
    )
    trained = {"modules_to_save": [saved]} if saved else {}
    config = BaLoraConfig(r=4, lora_alpha=4, regularizers=terms, **adapted_layers(layers), **trained)
    args = TrainingArguments(
        output_dir=directory,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        logging_steps=STEPS,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **sharding(kind, "LlamaDecoderLayer,OwnUnit" if saved else "LlamaDecoderLayer"),
    )
    if kind != "ddp":
        pass_as_gpus(args)
    model = tiny_llama(num_hidden_layers=4 if layers else 2)
    if saved:
        model.lm_head.__class__ = OwnUnit  # the teacher's copy is a unit as well, gathered after the teacher's pass
    trainer = SameRows(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        data_collator=DataCollatorForSeq2Seq(character_tokenizer()),
        callbacks=[keep],
        peft_config=config,
    )
    torch.manual_seed(3)
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)  # the student is not the teacher any more
    trainer.train()
    run: Any = trainer.ba_lora_run
    logged = [row["balora/consistency"] for row in trainer.state.log_history if "balora/consistency" in row]
    mean = {name: sum(step[name] for step in keep.steps) / STEPS for name in keep.steps[0]}
    return {"mean": mean, "consistency": logged, "shared": (run.shared.passes, run.shared.why)}


def main(directory: str, kind: str, layers: str = "", saved: str = "") -> None:
    torch.set_num_threads(1)
    found = {interval: mean_gradient(directory, kind, interval, layers, saved) for interval in (1, 4)}
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(directory, "result.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
