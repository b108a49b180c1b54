"""One run: a model, a task, a method, a learning rate and a seed, trained and scored on GLUE and GLUE-X."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from ..adapter.config import BaLoraConfig
from ..classification.data import columns_of, tokenised
from ..training.checks.arguments import check_arguments
from ..weights.off import without_terms
from .data import SampleTable, read_jsonl, read_split
from .job import Job
from .metrics import score
from .recipe import Recipe
from .records import data_digest, glue_x_digests
from .separation import FeatureTap, save_snapshots
from .tasks import GLUE_X, Task, comparable, positive_class

logger = logging.getLogger(__name__)


@runtime_checkable
class Predictor(Protocol):
    """What is used of a Trainer once it has trained; what `predict` returns has `predictions`."""

    def predict(self, test_dataset: Any) -> Any: ...


def jobs_of(
    recipe: Recipe, tasks: list[Task], methods: list[str], seeds: list[int], limit: int, data: str | None = None
) -> list[Job]:
    """Returns every combination of task, method, learning rate and seed, on the JSONL files in `data` or the hub's."""
    digests = {task.name: data_digest(data, task) for task in tasks}
    return [
        Job(
            task.name,
            method,
            recipe.model,
            rate,
            seed,
            recipe.of(task.name),
            recipe.regularizers,
            limit,
            digests[task.name],
        )
        for task in tasks
        for method in methods
        for rate in recipe.of(task.name).learning_rates
        for seed in seeds
    ]


def run_job(
    job: Job,
    task: Task,
    *,
    data: str | None,
    glue_x: str | None,
    keep: str | None = None,
    watch: tuple[Sequence[int], str] | None = None,
) -> dict[str, Any]:
    """Trains and scores a job. Returns a JSON-ready record.

    `keep`: a directory for its adapter. `watch`: optimizer steps after which the features of the first validation split
    are kept, and the .npz file that takes them.
    """
    from transformers import AutoTokenizer, DataCollatorWithPadding, PrinterCallback, set_seed

    import balora_plugin

    began = time.perf_counter()
    settings = job.settings
    set_seed(job.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(job.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {job.model} has no tokenizer that loads: {error}") from None
    if tokenizer.pad_token_id is None:  # GPT-2
        tokenizer.pad_token = tokenizer.eos_token
    model = _model(job, task, tokenizer)

    def prepared(rows: SampleTable, where: str, num_labels: int = 1) -> SampleTable:
        text, label = columns_of(rows.column_names, where)
        length = min(settings.max_length, tokenizer.model_max_length)
        table: SampleTable = tokenised(
            rows, tokenizer, text, label, max_length=length, num_labels=num_labels, where=where
        )
        return table

    with tempfile.TemporaryDirectory() as scratch:
        trainer = balora_plugin.BaLoraTrainer(
            model=model,
            args=_arguments(job, keep or scratch),
            train_dataset=prepared(read_split(task, "train", data, job.limit), f"{task.name} train", task.num_labels),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            peft_config=_adapter(job),
        )
        trainer.remove_callback(PrinterCallback)  # the command prints its table alone
        tap = None
        if watch is not None:
            watched = prepared(read_split(task, task.splits[0], data, job.limit), f"{task.name} {task.splits[0]}")
            tap = FeatureTap(watch[0], watched, trainer.data_collator)
            trainer.add_callback(tap)
        trainer.train()
        if watch is not None and tap is not None:
            save_snapshots(watch[1], list(tap.found.values()))
        scores = {}
        for split in task.splits:
            rows = read_split(task, split, data, job.limit)
            scores[split] = _scores(trainer, task, prepared(rows, f"{task.name} {split}"), task.kind)
        shifted = _glue_x(trainer, task, job, glue_x, prepared)
        if keep is not None:
            trainer.save_model(keep)
    return {
        "job": job.to_dict(),
        "scores": scores,
        "glue_x": shifted,
        "glue_x_data": {} if glue_x is None else glue_x_digests(glue_x, task),
        "kept": keep is not None,
        "steps_drawn": [] if watch is None else sorted(watch[0]),
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _model(job: Job, task: Task, tokenizer: Any) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            job.model, num_labels=task.num_labels, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"model {job.model} does not load for sequence classification: {error}") from None
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def _adapter(job: Job) -> BaLoraConfig | None:
    """Returns the method as a config: its terms are zero in the baselines, whose loss is normalised alike."""
    if job.method == "full":
        return None
    settings = job.settings
    terms = job.regularizers if job.method == "ba_lora" else without_terms(job.regularizers)
    return BaLoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        init_lora_weights=True if job.method == "lora" else "pissa",
        regularizers=terms,
    )


def _arguments(job: Job, output: str) -> Any:
    import torch
    from transformers import TrainingArguments

    settings = job.settings
    args = TrainingArguments(
        output_dir=output,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=job.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1: a part of all steps
        weight_decay=settings.weight_decay,
        bf16=settings.bf16 and torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        seed=job.seed,
        save_strategy="no",
        report_to=[],
        logging_steps=50,
        disable_tqdm=True,
    )
    check_arguments(args)  # full fine-tuning asks for it too: DataParallel would multiply its batch
    return args


def _scores(trainer: Predictor, task: Task, rows: SampleTable, kind: str) -> dict[str, float]:
    """Scores the model on `rows`, whose labels are of another `kind` perhaps: no loss is computed of them."""
    gold = list(rows["labels"])
    output = trainer.predict(rows.remove_columns("labels")).predictions
    logits = (output[0] if isinstance(output, tuple) else output).reshape(len(gold), -1)
    if task.kind == "similarity":
        return score(task.scores, logits[:, 0].tolist(), gold)
    found, gold = comparable(logits.argmax(-1).tolist(), [int(label) for label in gold], task.kind, kind)
    return score(task.scores, found, gold, positive=positive_class(kind))


def _glue_x(
    trainer: Predictor, task: Task, job: Job, directory: str | None, prepared: Callable[[SampleTable, str], SampleTable]
) -> dict[str, dict[str, float]]:
    """Scores the trained model, as it is, on the sets of GLUE-X that there are files of."""
    if directory is None:
        return {}
    found = {}
    for name, kind in GLUE_X.get(task.name, {}).items():
        path = os.path.join(directory, f"{name}.jsonl")
        if not os.path.isfile(path):
            logger.warning(f"--glue-x {directory} has no {name}.jsonl: {task.name} is not tested on it.")
            continue
        rows, dropped = read_jsonl(path, kind, job.limit)
        scores = _scores(trainer, task, prepared(rows, name), kind)
        found[name] = {**scores, "samples": len(rows), "without_label": dropped}
    return found
