"""Training runs that kill themselves with SIGKILL at chosen moments, for test_crash.py.

One process imports everything and forks a child per run: `python -m integration.workers.crash DIRECTORY`.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, BaLoraTrainer, RegularizerConfig
from tests.models import character_tokenizer, tiny_llama

STEPS = 6
ROWS = [{"text": f"The number {i} comes before {i + 1}" + " and so on" * (i % 3)} for i in range(10)]
KILL_AT = 4  # optimizer step
MOMENTS = ("in_step", "in_weights", "in_settings", "in_optimizer", "in_state", "before_seal", "over_another")


def trainer(host: str, directory: Path, **changes: Any) -> Trainer:
    """Schedules, dropout, accumulation and a teacher cache: everything that a resume must continue."""
    terms = RegularizerConfig(
        preset="iclr2026",
        lambda_consistency=0.5,
        teacher_cache=str(directory / "cache") if host == "trl" else None,
        teacher_interval=1 if host == "trl" else 2,
    )
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", lora_dropout=0.1, regularizers=terms)
    values = {
        "output_dir": str(directory / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "report_to": [],
        "use_cpu": True,
        "save_steps": 1,
        "save_total_limit": 3,
        "disable_tqdm": True,
        "seed": 3,
        **changes,
    }
    tokenizer = character_tokenizer()
    if host == "trl":
        from trl import SFTConfig

        args = SFTConfig(**values, bf16=False, gradient_checkpointing=False)
        return BaLoraSFTTrainer(
            model=tiny_llama(),
            args=args,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            peft_config=config,
        )
    return BaLoraTrainer(
        model=tiny_llama(),
        args=TrainingArguments(**values),
        train_dataset=Dataset.from_list([tokenizer(row["text"]) for row in ROWS]),
        data_collator=DataCollatorForLanguageModeling(copy.deepcopy(tokenizer), mlm=False),
        peft_config=config,
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieInStep(TrainerCallback):
    """Dies between the micro-batches of a step."""

    def on_substep_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == KILL_AT - 1:
            die()


def die_while_writing(part: str, directory: Path) -> None:
    """From now on, the first write of such a file into the checkpoint of KILL_AT is cut in half and the last."""
    marker = os.sep + f"checkpoint-{KILL_AT}"

    def cut(path: Any) -> None:
        if marker in str(path) and Path(path).exists():
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            die()

    def wrap(owner: Any, name: str, position: int) -> None:
        original = getattr(owner, name)

        def writing(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            cut(args[position])
            return result

        setattr(owner, name, writing)

    if part == "weights":
        import peft.peft_model

        wrap(peft.peft_model, "safe_save_file", 1)
    elif part in ("settings", "another"):  # before the adapter's last file, or after it
        from balora_plugin.adapter.saved import writing

        original = writing.write_settings

        def writing_settings(target: str, *args: Any) -> Any:
            if part == "another":
                original(target, *args)
            if marker in str(target):
                die()
            return None if part == "another" else original(target, *args)

        writing.write_settings = writing_settings
    elif part == "optimizer":
        wrap(torch, "save", 1)
    elif part == "seal":
        from balora_plugin.training import checkpoints

        sealing = checkpoints.seal

        def dying(target: str, *args: Any, **kwargs: Any) -> None:
            if marker in str(target):
                die()
            sealing(target, *args, **kwargs)

        checkpoints.seal = dying
    else:
        from transformers import TrainerState

        wrap(TrainerState, "save_to_json", 1)


def run(host: str, moment: str, directory: Path) -> None:
    if moment == "in_step":
        made = trainer(host, directory)
        made.add_callback(DieInStep())
    else:
        if moment == "over_another":  # where an earlier run has left a whole checkpoint of the same step
            trainer(host, directory, max_steps=KILL_AT, save_steps=KILL_AT, seed=4).train()
        die_while_writing(moment.split("_")[1], directory)
        made = trainer(host, directory)
    made.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for host in ("trl", "transformers"):
        for moment in MOMENTS:
            where = Path(sys.argv[1], f"{host}-{moment}")
            child = os.fork()
            if not child:
                run(host, moment, where)
                os._exit(0)  # it should have died
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                raise SystemExit(f"{host}, {moment}: ended with status {status} instead of being killed")
