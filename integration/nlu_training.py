"""Small classification runs, for the tests of this process and those of several ranks."""

from __future__ import annotations

from classifiers import batch, classifier
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig

TERMS = RegularizerConfig(preset="iclr2026", schedule="constant", lambda_consistency=0.5)


def rows(n=12, **kind):
    data = batch(n, **kind)
    return Dataset.from_dict({key: value.tolist() for key, value in data.items()})


class Gradients(TrainerCallback):
    """The gradients of the first optimizer step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.found:
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def arguments(directory, **changes):
    values = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "seed": 1,
    }
    return TrainingArguments(**{**values, **changes})


def build(directory, model=None, terms=TERMS, data=None, adapter="ba_lora", callbacks=(), **changes):
    keys = ("teacher_model", "compute_metrics")
    extra = {key: changes.pop(key) for key in keys if key in changes}
    if adapter.startswith("ba_lora"):
        start = True if "plain" in adapter else "pissa"
        extra["peft_config"] = BaLoraConfig(r=2, lora_alpha=2, regularizers=terms, init_lora_weights=start)
    elif adapter == "lora":
        extra |= {"peft_config": LoraConfig(r=2, task_type="SEQ_CLS"), "regularizers": terms}
    else:
        extra["regularizers"] = terms
    data = rows() if data is None else data
    return BaLoraTrainer(
        model=classifier() if model is None else model,
        args=arguments(directory, **changes),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        callbacks=list(callbacks),
        **extra,
    )
