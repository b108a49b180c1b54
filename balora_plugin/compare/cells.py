"""One cell of the grid: a model, a method, a learning rate and a seed, trained and measured row by row."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from ..adapter.config import BaLoraConfig
from ..objective.request import StepOutput
from ..report.runs import number as logged
from ..samples.jsonl import Samples
from ..samples.models import load_model
from ..samples.rendering import as_trained
from .plan import FROM_LORA, Cell, GridSettings

RECORDED = ("method", "learning_rate", "seed", "before", "final", "rows", "first_gradient_norm", "seconds")


@dataclass(frozen=True)
class Data:
    """What cells are trained on and measured with."""

    train: Samples
    held_out: Samples
    tokenizer: Any


class KeepsRows:
    """In front of a trainer with the terms: keeps what an evaluation of one row a batch measured of each."""

    kept: dict[str, list[float]] | None = None

    def record_ba_lora_metrics(self, out: StepOutput, inputs: dict[str, Any], training: bool) -> None:
        """Keeps sums over the row; and what the host keeps."""
        super().record_ba_lora_metrics(out, inputs, training)  # type: ignore[misc]
        if self.kept is None or training:
            return
        for name, value in {"loss": out.task, "count": out.count, "drift": out.drift, "right": out.correct}.items():
            if value is not None:
                self.kept.setdefault(name, []).append(float(value))


def train_cell(cell: Cell, recipe: GridSettings, data: Data, output: str) -> dict[str, Any]:
    """Trains a cell, saves its adapter and its log in `output`; returns its record, JSON-ready.

    Raises:
        ValueError: the model does not load, or cannot be trained so.
    """
    from transformers import PrinterCallback, set_seed

    began = time.perf_counter()
    set_seed(cell.seed)
    model = load_model(recipe.model, data.train, data.tokenizer)
    build = _classifier if data.train.task == "classification" else _language_model
    trainer = build(model, cell, recipe, data, output)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_progress())
    trainer.train()
    final = _final(trainer)
    trainer.save_model()
    trainer.save_state()
    return {
        "method": cell.method,
        "learning_rate": cell.rate,
        "seed": cell.seed,
        "before": _numbers(_evaluations(trainer)[0]),
        "final": _numbers(final),
        "rows": _row_by_row(trainer),
        "first_gradient_norm": _first(trainer.state.log_history, "grad_norm"),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """What an evaluation measured, by names without their prefix."""
    return {key.removeprefix("eval_"): number for key, value in row.items() if (number := logged(value)) is not None}


def _evaluations(trainer: Any) -> list[dict[str, Any]]:
    """The rows of all evaluations, that before the first step first."""
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def _final(trainer: Any) -> dict[str, Any]:
    """The last evaluation's row: that of the last step, or another one now."""
    rows = _evaluations(trainer)
    if rows and rows[-1]["step"] == trainer.state.global_step:
        return dict(rows[-1])
    return dict(trainer.evaluate())


def _progress() -> Any:
    """One line on stderr an evaluation, and one when a step's time is known."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def __init__(self) -> None:
            self._since: float | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:  # the first one takes longer than the others
                self._since = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self._since is not None and state.global_step == 2:
                seconds = time.perf_counter() - self._since
                left = seconds * (state.max_steps - 2)
                print(f"  {seconds:.2g} s a step: {left:.0f} s more of them in this run", file=sys.stderr, flush=True)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            drift = (metrics or {}).get("eval_balora/drift", float("nan"))
            loss = (metrics or {}).get("eval_loss", float("nan"))
            line = f"  step {state.global_step}/{state.max_steps}: held-out loss {loss:.4f}, drift {drift:.4f}"
            print(line, file=sys.stderr, flush=True)

    return Progress()


def _arguments(cell: Cell, recipe: GridSettings, output: str, accelerated: bool) -> dict[str, Any]:
    return {
        "output_dir": output,
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch,
        "per_device_eval_batch_size": 8,
        "learning_rate": cell.rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # below 1: a part of all steps
        "logging_steps": max(1, recipe.steps // 50),
        "eval_on_start": True,  # the model before: no start changes what it computes
        "eval_strategy": "steps",
        "eval_steps": max(1, -(-recipe.steps // 5)),
        "save_strategy": "no",
        "report_to": [],
        "seed": cell.seed,
        "bf16": accelerated,
        "use_cpu": not accelerated,
        "disable_tqdm": True,
    }


def _adapter(cell: Cell, recipe: GridSettings, task_type: str) -> BaLoraConfig | None:
    if cell.method == "full":
        return None
    return BaLoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank,
        target_modules="all-linear",
        task_type=task_type,
        init_lora_weights=True if cell.method in FROM_LORA else "pissa",
        regularizers=recipe.terms_of(cell.method),
    )


def _language_model(model: Any, cell: Cell, recipe: GridSettings, data: Data, output: str) -> Any:
    import torch
    from datasets import Dataset

    from ..hosts.trl import BaLoraSFTTrainer, SFTConfig

    def table(samples: Samples) -> Any:
        return Dataset.from_list([as_trained(row, data.tokenizer) for row in samples.rows])

    arguments = _arguments(cell, recipe, output, torch.accelerator.is_available())
    kind = type("ComparedSFTTrainer", (KeepsRows, BaLoraSFTTrainer), {})
    return kind(
        model=model,
        args=SFTConfig(**arguments, max_length=recipe.max_length, gradient_checkpointing=False),
        train_dataset=table(data.train),
        eval_dataset=table(data.held_out),
        processing_class=data.tokenizer,
        peft_config=_adapter(cell, recipe, "CAUSAL_LM"),
        regularizers=recipe.terms_of(cell.method),
    )


def _classifier(model: Any, cell: Cell, recipe: GridSettings, data: Data, output: str) -> Any:
    import torch
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, TrainingArguments

    from ..classification.data import tokenised
    from ..classification.scores import scores
    from ..hosts.transformers import BaLoraTrainer

    def table(samples: Samples) -> Any:
        return tokenised(
            Dataset.from_list(samples.rows),
            data.tokenizer,
            samples.columns,
            "label",
            max_length=min(recipe.max_length, data.tokenizer.model_max_length),
            num_labels=samples.outputs,
            where=samples.where,
        )

    arguments = _arguments(cell, recipe, output, torch.accelerator.is_available())
    kind = type("ComparedTrainer", (KeepsRows, BaLoraTrainer), {})
    return kind(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=table(data.train),
        eval_dataset=table(data.held_out),
        data_collator=DataCollatorWithPadding(data.tokenizer),
        processing_class=data.tokenizer,
        compute_metrics=scores,
        peft_config=_adapter(cell, recipe, "SEQ_CLS"),
        regularizers=recipe.terms_of(cell.method),
    )


def _row_by_row(trainer: Any) -> dict[str, list[float]]:
    """The sums of each held-out row, from an evaluation of one a batch, which is not logged."""
    from transformers.utils import logging

    trainer.kept = {}
    trainer.args.per_device_eval_batch_size = 1
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # of a single sample there is no spectrum: nobody asked for one
    try:
        trainer.evaluation_loop(trainer.get_eval_dataloader(), "rows", prediction_loss_only=True)
    finally:
        logging.set_verbosity(before)
    return dict(trainer.kept)


def _first(history: list[dict[str, Any]], key: str) -> float | None:
    return next((float(row[key]) for row in history if key in row), None)
