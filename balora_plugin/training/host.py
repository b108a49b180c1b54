"""What the parts of a run use of a transformers Trainer, so that type checks and a test see a renamed name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..pretrained.attention import RunArguments


class Arguments(RunArguments, Protocol):
    """What is used of TrainingArguments; what only some hosts have is asked for by getattr where it is needed."""

    output_dir: str | None
    bf16_full_eval: bool
    fp16_full_eval: bool
    max_steps: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    train_batch_size: int
    world_size: int
    process_index: int
    seed: int
    dataloader_num_workers: int
    disable_tqdm: bool
    should_save: bool
    save_only_model: bool
    average_tokens_across_devices: bool


class State(Protocol):
    """What is used of a TrainerState."""

    global_step: int
    max_steps: int
    epoch: float | None


class Accelerator(Protocol):
    """What is used of accelerate's Accelerator."""

    num_processes: int
    process_index: int
    is_main_process: bool
    is_fsdp2: bool
    mixed_precision: str
    state: Any
    gather: Callable[[Tensor], Tensor]
    reduce: Callable[[Tensor, str], Tensor]

    def wait_for_everyone(self) -> None:
        """Waits until every process is here."""


class HostTrainer(Protocol):
    """A transformers Trainer, of any subclass, as the parts of a run beside its loss see it."""

    model: Any
    model_wrapped: nn.Module
    args: Arguments
    state: State
    accelerator: Accelerator
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns the loader that training reads."""

    def get_eval_dataloader(self, eval_dataset: Any) -> DataLoader[Any]:
        """Returns the loader that an evaluation of this dataset reads."""

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Returns the autocast that a step's forward pass runs in."""


def optimizer_name(args: Any) -> str:
    """Returns the `optim` of a trainer's arguments as plain text."""
    return str(getattr(args.optim, "value", args.optim))
