"""What the plug-in file does: ms-swift's three tables, TRAINING_ARGS_MAPPING, TRAINER_MAPPING and tuners_map.

ms-swift imports the file while it makes its arguments, then looks up the class of its training arguments (here they are
checked, all of them, before the model loads), the tuner, and the trainer. Beside any other tuner each entry gives what
was in the table before.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Iterator
from typing import Any

from swift.arguments import SftArguments
from swift.trainers import TrainerFactory
from swift.tuner_plugin import tuners_map

from ...findings import Finding
from .checks import findings_of_run
from .errors import print_without_traceback, refuse_arguments
from .keys import SUPERSEDED
from .names import PLUGIN_FILE, TASKS, TUNER, VARIABLE

_STOCK_TRAINERS = {"causal_lm": "swift.trainers.Seq2SeqTrainer", "seq_cls": "swift.trainers.Trainer"}
_before: dict[str, str] = {}  # the trainers that stood in the table


def register(file: str) -> None:
    """Puts `tuner_type: ba_lora` into ms-swift's tables; `file` is the plug-in, by which saved arguments know it."""
    if os.path.realpath(file) != os.path.realpath(PLUGIN_FILE):
        raise ValueError(f"{file} is a copy of the plug-in: name {PLUGIN_FILE} itself (balora swift prints it).")
    print_without_traceback()
    from .tuner import BaLoraTuner

    tuners_map[TUNER] = BaLoraTuner
    for task, stock in list(TrainerFactory.TRAINING_ARGS_MAPPING.items()):
        name = f"{task}_arguments"
        if stock != f"{__name__}.{name}":
            globals()[name] = _Checked(task, stock)
            TrainerFactory.TRAINING_ARGS_MAPPING[task] = f"{__name__}.{name}"
    for task in TASKS:
        if TrainerFactory.TRAINER_MAPPING[task] != f"{__name__}.{task}_trainer":
            _before[task] = TrainerFactory.TRAINER_MAPPING[task]
            TrainerFactory.TRAINER_MAPPING[task] = f"{__name__}.{task}_trainer"


class _Checked:
    """In the place of a class of training arguments: takes every argument of the run, and checks them."""

    def __init__(self, task: str, stock: str) -> None:
        self.task, self.stock = task, stock
        names = {field.name for field in dataclasses.fields(SftArguments)} | set(self._accepted())
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(names)]
        )

    def _accepted(self) -> Any:
        return inspect.signature(_found(self.stock)).parameters

    def __call__(self, **values: Any) -> Any:
        values_here = values if self.task == values.get("task_type") else {**values, "rlhf_type": self.task}
        refuse_arguments([*findings_of_run(values_here, os.environ.get(VARIABLE)), *_displaced(values)])
        if values.get("tuner_type") == TUNER:
            _say_superseded(values)
        accepted = self._accepted()
        return _found(self.stock)(**{key: value for key, value in values.items() if key in accepted})


def _found(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _displaced(values: dict[str, Any]) -> Iterator[Finding]:
    """Finds other plug-ins that bring a trainer, which would be left out, or leave the terms out."""
    task = values.get("task_type")
    if values.get("tuner_type") != TUNER or task not in TASKS:
        return
    now = TrainerFactory.TRAINER_MAPPING[task]
    for trainer in {_before[task], now} - {_STOCK_TRAINERS[task], f"{__name__}.{task}_trainer"}:
        why = f"bring a trainer of their own ({trainer}), in place of the one that computes the terms"
        yield Finding("external_plugins", None, why, "remove that plug-in", True)


def _say_superseded(values: dict[str, Any]) -> None:
    """Says once, on the first process, which settings of speed something else takes the place of."""
    from swift.utils import get_logger

    for key, instead in SUPERSEDED.items():
        if values.get(key) not in (None, False, "token"):
            get_logger().info_once(f"BA-LoRA: {key}: {values[key]} is superseded: {instead}.")


def _trainer(task: str, **given: Any) -> Any:
    if given["args"].tuner_type != TUNER:
        return _found(_before[task])(**given)
    from . import trainer

    return {"causal_lm": trainer.SwiftBaLoraTrainer, "seq_cls": trainer.SwiftBaLoraClassifierTrainer}[task](**given)


def causal_lm_trainer(**given: Any) -> Any:
    """Makes a language model's trainer: with the terms beside `tuner_type: ba_lora`, else what was there before."""
    return _trainer("causal_lm", **given)


def seq_cls_trainer(**given: Any) -> Any:
    """Makes the trainer of a classifier in the same way."""
    return _trainer("seq_cls", **given)
