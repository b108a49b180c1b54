"""Fine-tunes with TRL: BaLoraSFTTrainer in the place of SFTTrainer, in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from .base import BaseModel
from .corpus import Instruction
from .methods import RANK, SHARE_INTERVAL, TERM_PREFIX, Method, TrainedRun, last_logged
from .settings import FinetuningSettings


def peft_config(method: Method) -> LoraConfig:
    """Stock PEFT's configuration, or for BA-LoRA its own, with the terms."""
    shape: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        "init_lora_weights": method.start,
    }
    if method.terms is None:
        return LoraConfig(**shape)
    from balora_plugin import BaLoraConfig, RegularizerConfig

    return BaLoraConfig(**shape, regularizers=RegularizerConfig(**method.terms, share_interval=SHARE_INTERVAL))


def trainer_class(method: Method) -> type[SFTTrainer]:
    """TRL's trainer, or for BA-LoRA its drop-in."""
    if not method.is_ba_lora:
        return SFTTrainer
    from balora_plugin import BaLoraSFTTrainer

    return BaLoraSFTTrainer


class BarCallback(TrainerCallback):
    """Shows one progress bar named `description` while a model is trained."""

    def __init__(self, description: str, steps: int, progress: bool) -> None:
        self.bar = tqdm(total=steps, desc=description, unit="step", disable=not progress)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer after every optimizer step."""
        self.bar.update()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Called by the trainer once at the end."""
        self.bar.close()


def trainer_arguments(settings: FinetuningSettings, folder: Path, start: str | bool = True) -> SFTConfig:
    """TRL's configuration: float32 on the CPU, nothing reported or saved along the way."""
    return SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.rate_of(start),
        lr_scheduler_type="cosine",
        max_length=settings.max_length,
        seed=settings.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=max(1, settings.steps // 6),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def finetune(
    method: Method,
    base: BaseModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Instruction],
    settings: FinetuningSettings,
    adapter: Path,
    progress: bool = True,
) -> TrainedRun:
    """Fine-tunes a fresh copy of the base on `pairs` and saves the adapter to the folder `adapter`.

    The copy is fresh because PiSSA changes the weights it starts from; the seed is set anew, so that all methods see
    the same examples in the same order.
    """
    set_seed(settings.seed)
    trainer = trainer_class(method)(
        model=base.load_model(),
        args=trainer_arguments(settings, adapter, method.start),
        train_dataset=Dataset.from_list([pair.as_row() for pair in pairs]),
        processing_class=tokenizer,
        peft_config=peft_config(method),
    )
    trainer.remove_callback(PrinterCallback)  # prints every log entry once the trainer's own bar is off
    trainer.add_callback(BarCallback(f"fine-tuning, {method.label}", settings.steps, progress))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(adapter))
    terms = last_logged(trainer.state.log_history, TERM_PREFIX)
    return TrainedRun(trainer.model, adapter, seconds, terms, seconds_per_step=seconds / settings.steps)
