"""Says what trains, and where terms do not act as written: another loss, a Trainer before the mixin, own dropout."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ..adapter.config import active_config
from ..distributed import is_sharded
from ..pretrained.classifier_head import is_classifier
from ..pretrained.lm_head import check_head, head_marks
from ..weights.in_words import weights_in_words
from .checks.arguments import check_loss_function
from .checks.teacher import check_teacher
from .checks.trained import check_adapters, check_moves, check_steps
from .host import HostTrainer
from .model_probe import warn_of_the_task
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


def say_no_terms(model: nn.Module, host: str) -> None:
    """Says what a trainer trains that was given neither an adapter of ours nor terms; `host`: the name of its class."""
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if active_config(model) is None:
        what, remedy = f"all {count:,} parameters of the model", "peft_config=BaLoraConfig(...)"
    else:
        what, remedy = f"{count:,} parameters of {type(active_config(model)).__name__}'s adapter", "regularizers=..."
    logger.warning(
        f"BA-LoRA: no terms: {host} trains {what}, as the host's own trainer does. For BA-LoRA pass {remedy}."
    )


class BeforeTraining(TrainerCallback):
    """Looks once more, when training begins, at what may have changed since the trainer was made.

    Raises:
        ValueError: settings were changed, the head computes other logits than it did, the adapter is off, merged or
            frozen, the optimizer holds nothing of it or never steps, or its base would move.
    """

    def __init__(self, run: RunState, host: HostTrainer) -> None:
        self._run, self._host = run, host
        self._heads = [head_marks(model) for model in _with_heads(run)]

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        run, config = self._run, self._run.config
        run.metrics.begin()
        check_loss_function(getattr(self._host, "compute_loss_func", None), run.task_form)
        run.as_made.check(config, run.adapter)
        for way in (run.shared, run.by_layer):
            if way is None:
                continue
            way.renew()
            if run.adapter is not run.as_made.adapter:  # its layers may be others
                way.stop("another adapter is active than when the trainer was made")
        check_adapters(run.model)
        if not (self._host.is_fsdp_enabled or self._host.is_deepspeed_enabled):  # their parameters may be others
            check_moves(run.wrapped, optimizer, run.warn)
            check_steps(optimizer, self._host.accelerator)
            check_heads_again(_with_heads(run), self._heads)
        if config.monitor and not config.lambda_consistency and run.teacher is None:
            check_teacher(run.adapter, None, model=run.model)
        if not config.lambda_consistency:
            return
        check_teacher(run.adapter, run.teacher, cached=config.teacher_cache is not None, model=run.model)
        rows = state.max_steps * args.gradient_accumulation_steps * args.train_batch_size
        if config.teacher_interval >= rows > 1:
            run.warn(
                "rare_teacher",
                f"teacher_interval={config.teacher_interval} is not below this run's {rows} rows on a process: the "
                "teacher meets the first one, where student and teacher still agree, and hardly another, so "
                f"lambda_consistency={config.lambda_consistency:g} does not act. Write a lower teacher_interval.",
            )


def _with_heads(run: RunState) -> list[PreTrainedModel]:
    """The models whose logits the terms compute; a classifier gives its own."""
    return [model for model in (run.model, run.teacher) if model is not None and run.config.task == "nlg"]


def check_heads_again(models: list[PreTrainedModel], made: list[Any]) -> None:
    """Refuses a head that has got a hook, or a scale or cap in its config, since the trainer was made.

    Not where mixed precision stands around the model's own forward: that of full fine-tuning, trained once before.

    Args:
        models: Those with heads.
        made: [`head_marks`] of each, of when the trainer was made.

    Raises:
        ValueError: the logits are no longer what the terms are computed on.
    """
    for model, marks in zip(models, made, strict=True):
        if head_marks(model) == marks or hasattr(model, "_original_forward") or is_sharded(model):
            continue
        try:
            check_head(model)
        except ValueError as error:
            raise ValueError(
                f"{error} When the trainer was made they were: take away what has changed since (a hook on the head, "
                "a logit cap or scale in model.config)."
            ) from None
        except RuntimeError as error:  # of memory, say: the first step fails of it too, and says what it was
            logger.debug("BA-LoRA: the head was not looked at again: %s", error)


class RecordedTerms(TrainerCallback):
    """Looks whether any loss with the terms was trained, and says it once where none was.

    After the first step, and at every log and the end for the steps since.
    """

    def __init__(self, run: RunState, host: HostTrainer) -> None:
        self._run, self._host = run, host
        self._steps = self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps = self._seen = 0
        self._run.reached = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps += 1
        if control.should_log or not self._seen:
            self._look(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log:
            self._look(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)

    def _look(self, step: int) -> None:
        steps, reached = self._steps, self._run.reached
        first = not self._seen
        self._seen += steps
        self._steps, self._run.reached = 0, False  # the next pass notes it anew
        weights = weights_in_words(self._run.config)
        if steps and not reached and weights:
            span = f"step {step}" if steps == 1 else f"steps {step - steps + 1} to {step}"
            called = first and self._run.metrics.recorded
            self._say(weights, "the first step" if first else f"{span} (they did before)", called=called)

    def _say(self, weights: list[str], when: str, *, called: bool) -> None:
        kind = type(self._host)
        owner = next((cls.__name__ for cls in kind.__mro__ if "compute_loss" in vars(cls)), kind.__name__)
        owner = "the instance" if "compute_loss" in vars(self._host) else owner
        dropped = " (super().compute_loss was called, and its loss is not in what was trained)"
        dropped = dropped if called else ""
        self._run.warn(
            "not_acting",
            f"{', '.join(weights)} did not act in {when}: {owner}.compute_loss (or the training_step) has a "
            f"loss of its own and leaves the terms out{dropped}. Return what super().compute_loss(...) returns; for "
            f"weights of classes, samples or tokens override weigh_ba_lora_task instead ({_GUIDE}), or set every "
            "lambda to 0.",
        )


def warn_at_set_up(run: RunState, args: Any) -> None:
    """Says once what of a model and of its arguments makes the terms something else than they seem."""
    warn_of_dropout(run)
    warn_of_noise(run, args)
    warn_of_the_task(run)


def warn_of_noise(run: RunState, args: Any) -> None:
    """Says once that NEFTune's noise reaches the student alone, so that the consistency term measures it."""
    alpha = getattr(args, "neftune_noise_alpha", None)
    if alpha and run.config.lambda_consistency:
        run.warn(
            "neftune",
            f"neftune_noise_alpha={alpha:g} adds noise to the student's embeddings, and the teacher has none: the "
            "consistency term is not 0 at step 0, and weighs the noise too. Leave it out to measure what was trained.",
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
