"""Says what trains, and where terms do not act as written: another loss, a Trainer before the mixin, own dropout."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ..config import weights_in_words
from ..pretrained.classifier_head import is_classifier
from .host import HostTrainer
from .run_state import RunState

logger = logging.get_logger(__name__)

_GUIDE = "docs/design/training.md, 'Writing a trainer of your own'"


def check_bases(cls: type, mixin: type) -> None:
    """Refuses a class in which a Trainer stands before the mixin, whose methods would then never run.

    Raises:
        TypeError: names the class, its bases and what to write.
    """
    from transformers import Trainer

    for before in cls.__mro__:
        if before is mixin:
            return
        if issubclass(before, Trainer) and not issubclass(before, mixin):
            bases = [base.__name__ for base in cls.__bases__]
            first = [name for base, name in zip(cls.__bases__, bases, strict=True) if issubclass(base, mixin)]
            order = ", ".join([*first, *(name for name in bases if name not in first)])
            raise TypeError(
                f"class {cls.__name__}({', '.join(bases)}): {before.__name__} stands before {mixin.__name__}, so the "
                f"terms would be left out: write class {cls.__name__}({order})."
            )


class SayWhatTrains(TrainerCallback):
    """Lists at the start of a training what the adapter stands on and what it leaves out."""

    def __init__(self, run: RunState) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run.adapted is not None and state.is_world_process_zero:
            (logger.info if args.disable_tqdm else print)(str(self._run.adapted))


class RecordedTerms(TrainerCallback):
    """Looks after the first step whether any micro-batch asked for the terms, and says it where none did."""

    def __init__(self, run: RunState, host: HostTrainer) -> None:
        self._run, self._host = run, host

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run.metrics.recorded:
            return
        weights = weights_in_words(self._run.config)
        if not weights:
            return
        kind = type(self._host)
        owner = next((cls.__name__ for cls in kind.__mro__ if "compute_loss" in vars(cls)), kind.__name__)
        self._run.warn(
            "not_acting",
            f"{', '.join(weights)} did not act in the first step: {owner}.compute_loss (or the training_step) has a "
            "loss of its own and leaves the terms out. Return what super().compute_loss(...) returns; for weights of "
            f"classes, samples or tokens override weigh_ba_lora_task instead ({_GUIDE}), or set every lambda to 0.",
        )


def warn_of_dropout(run: RunState) -> None:
    """Says once that a model has dropout of its own, which the consistency term measures: the teacher has none.

    An adapter's own (lora_dropout) is a choice, and is not looked at.
    """
    rates = model_dropout(run.model) if run.config.lambda_consistency else {}
    if not rates:
        return
    keys = dropout_keys(run.model, set(rates.values()))
    where = "with " + ", ".join(f"{key}=0.0" for key in keys) if keys else "without it"
    run.warn(
        "dropout",
        f"the model has dropout of its own ({', '.join(f'{rate:g}' for rate in sorted(set(rates.values())))} in "
        f"{len(rates)} modules, the first is {next(iter(rates))}), and the teacher has none: the consistency term is "
        f"not 0 at step 0, and weighs the noise too. To switch it off load the model {where} (Axolotl: "
        "overrides_of_model_config).",
    )


def model_dropout(model: nn.Module) -> dict[str, float]:
    """Returns {name of a module: its rate} for the dropout that acts in training; no adapter's.

    A module's rate is nn.Dropout's, or a number that the module holds by a name of that kind (attention_dropout).
    """
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        own = {key: value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)}
        rates = [module.p] if isinstance(module, nn.modules.dropout._DropoutNd) else list(own.values())
        if any(rate > 0 for rate in rates):
            found[name.replace(".base_layer", "")] = max(rates)
    return found


def dropout_keys(model: PreTrainedModel, rates: set[float]) -> list[str]:
    """Returns the keys of a model's config that name one of these dropout rates, those of unused heads left out."""
    config = model.config.get_text_config()
    unused = ("summary",) if is_classifier(model) else ("summary", "classifier")
    keys = [key for key in config.to_dict() if "drop" in key and not key.startswith(unused)]
    return [key for key in keys if getattr(config, key, None) in rates]
