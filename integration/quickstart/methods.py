"""The fine-tuning methods that the quickstart compares, all of one adapter shape, and how each is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from .corpus import Instruction
from .settings import FinetuningSettings
from .tiny_model import BaseModel

ADAPTER_SHAPE: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}
TERM_PREFIX = "balora/"
SHARE_INTERVAL = 10  # steps between two measurements of the terms' gradients


def lora() -> LoraConfig:
    """Stock LoRA: B starts at zero, the base weights stay as they are."""
    return LoraConfig(**ADAPTER_SHAPE)


def pissa() -> LoraConfig:
    """Stock PiSSA: the adapter starts as the leading singular part of each weight, which PEFT takes out of the base."""
    return LoraConfig(**ADAPTER_SHAPE, init_lora_weights="pissa")


def ba_lora(**regularizers: Any) -> Callable[[], LoraConfig]:
    """Configuration of BA-LoRA with these `RegularizerConfig` arguments, built on demand."""

    def build() -> LoraConfig:
        from balora_plugin import BaLoraConfig, RegularizerConfig

        settings = RegularizerConfig(**regularizers, share_interval=SHARE_INTERVAL)
        return BaLoraConfig(**ADAPTER_SHAPE, regularizers=settings)

    return build


@dataclass(frozen=True)
class Method:
    """One row of the comparison: `key` names it on the command line and as a folder, `label` in the table."""

    key: str
    label: str
    peft_config: Callable[[], LoraConfig]
    is_ba_lora: bool

    @property
    def fits_untouched_base(self) -> bool:
        """Whether the saved adapter leaves the base as it is; stock PiSSA's takes its start out of the weights."""
        return self.peft_config is not pissa

    def trainer_class(self) -> type[SFTTrainer]:
        """TRL's trainer, or for BA-LoRA its drop-in."""
        if not self.is_ba_lora:
            return SFTTrainer
        from balora_plugin import BaLoraSFTTrainer

        return BaLoraSFTTrainer


METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        Method("lora", "LoRA", lora, False),
        Method("pissa", "PiSSA", pissa, False),
        Method("ba-lora-paper", "BA-LoRA (paper)", ba_lora(preset="paper"), True),
        Method("ba-lora-iclr2026", "BA-LoRA (iclr2026)", ba_lora(preset="iclr2026"), True),
        Method(
            "ba-lora-visible",
            "BA-LoRA (visible)",
            ba_lora(lambda_consistency=0.5, lambda_diversity=0.02, lambda_svd=0.02),
            True,
        ),
    )
}


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


def trainer_arguments(settings: FinetuningSettings, folder: Path) -> SFTConfig:
    """TRL's configuration: float32 on the CPU, nothing reported or saved along the way."""
    return SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
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


@dataclass(frozen=True)
class TrainedRun:
    """A fine-tuned model in memory, its saved adapter, the seconds of training and the last logged loss terms.

    `logged_terms` is empty without regularisers; its `balora/share_*` are the norms of the weighted terms' gradients
    over that of the task's.
    """

    model: PeftModel
    adapter: Path
    seconds: float
    logged_terms: dict[str, float]

    def largest_share(self) -> float | None:
        """The strongest regulariser's gradient relative to the task's, None without regularisers."""
        shares = [value for name, value in self.logged_terms.items() if name.startswith(f"{TERM_PREFIX}share_")]
        return max(shares, default=None)


def last_logged(history: Sequence[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Last value of every logged quantity whose name starts with `prefix`."""
    return {
        name: float(value)
        for entry in history
        for name, value in entry.items()
        if name.startswith(prefix) and isinstance(value, (int, float))
    }


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
    trainer = method.trainer_class()(
        model=base.load_model(),
        args=trainer_arguments(settings, adapter),
        train_dataset=Dataset.from_list([pair.as_row() for pair in pairs]),
        processing_class=tokenizer,
        peft_config=method.peft_config(),
    )
    trainer.remove_callback(PrinterCallback)  # prints every log entry once the trainer's own bar is off
    trainer.add_callback(BarCallback(f"fine-tuning, {method.label}", settings.steps, progress))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(adapter))
    return TrainedRun(trainer.model, adapter, seconds, last_logged(trainer.state.log_history, TERM_PREFIX))
