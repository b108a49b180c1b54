"""What happens to a trainer once, before its first step: checks, the patched forward, the teacher, the run's state."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

from peft import LoraConfig, PeftModel
from torch import nn
from transformers.utils import logging

from ..adapter.config import BaLoraConfig, active_config
from ..adapter.kinds import what_is_adapted
from ..adapter.saved import provenance
from ..config import RegularizerConfig, as_regularizers
from ..distributed import check_loaded
from ..objective.classification import classification_step
from ..objective.install import install
from ..pretrained.attention import check_attention, check_same_attention
from ..pretrained.lm_head import check_head
from ..pretrained.patched import check_unpatched
from ..pretrained.quantised import protect_weights
from ..pretrained.switch import TeacherSwitch
from . import classification
from .acting import BeforeTraining, RecordedTerms, say_no_terms, warn_at_set_up
from .anchors import open_run_anchors
from .banner import Banner
from .card_metrics import CardMetrics
from .checks.arguments import check_arguments, check_compiled_once, check_loss_function, check_saving
from .checks.model import resolve
from .checks.since import AsMade
from .checks.teacher import check_teacher
from .checks.trained import check_adapters
from .compiling import Asked, compiled_passes
from .earlier_runs import EarlierRuns
from .fill_cache import open_run_cache
from .finite_guard import FiniteGuard
from .first_norms import FirstNorms
from .host import HostTrainer
from .liger import give_kernels, without_losses
from .metrics import TermMetrics
from .monitored import monitored_teacher
from .own_weights import OwnWeights
from .packing_probe import PackingProbe
from .resuming import NothingLeft, Resumed
from .run_state import Inputs, RunState, WarnOnce
from .setting_weights import SettingWeights
from .sharing import layers_to_share, teacher_by_layer
from .task_form import task_form_of

logger = logging.get_logger(__name__)

_RENAMED = {  # hooks of earlier releases
    "_extend_inputs": "extend_ba_lora_inputs",
    "_record_host_metrics": "record_ba_lora_metrics",
    "_ba_lora_check_task": "check_ba_lora_task",
}


class BaLoraHost(HostTrainer, Protocol):
    """A Trainer with the mixin: what its class says of BA-LoRA."""

    ba_lora_head_checked: bool
    ba_lora_fresh_optimizer: bool
    ba_lora_loss_type: str | None

    def check_ba_lora_task(self, config: RegularizerConfig) -> None:
        """Refuses a family of models that the host does not train."""

    def extend_ba_lora_inputs(self, inputs: Inputs) -> Inputs:
        """Adds the keywords that the host's own compute_loss would."""

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Brings a batch to the device: transformers has no public name for it, and hosts override this one."""


@dataclass(frozen=True)
class Given:
    """What a trainer was constructed with beside its host's own arguments."""

    regularizers: RegularizerConfig | None = None
    teacher_model: Any = None
    backend: Asked | None = None


def open_run(host: BaLoraHost, given: Given) -> RunState | None:
    """Sets a trainer up for its terms and returns its run's state; None where it has none and stays as it is.

    Raises:
        ValueError: settings that do not go together, a model or a head that the terms cannot work with; names the key,
            its value and what to write.
        TypeError: regularizers or teacher_model of another type; a hook under a name that it had earlier.
    """
    for old, new in _RENAMED.items():
        if hasattr(type(host), old):
            raise TypeError(f"{type(host).__name__}.{old} is not called any more: name it {new}.")
    adapter = active_config(host.model)
    regularizers = _terms_of(adapter, given)
    if regularizers is None:
        say_no_terms(host.model, type(host).__name__)
        return None
    warn = WarnOnce()
    bare = host.model.get_base_model() if isinstance(host.model, PeftModel) else host.model
    config = _check(host, bare, adapter, regularizers, given)
    second = monitored_teacher(host, bare, config, given.teacher_model)
    host.args = without_losses(host.args, warn)
    if not host.ba_lora_head_checked and config.task == "nlg":
        check_head(bare)
    protect_weights(bare)  # a base under another adapter too
    install(bare, classification_step if config.task == "nlu" else None)
    run = RunState(
        config=config,
        wrapped=host.model,
        model=bare,
        switch=TeacherSwitch(bare),
        metrics=TermMetrics(config, warn, outputs=bare.config.num_labels if config.task == "nlu" else None),
        own=OwnWeights(config),
        as_made=AsMade.of(regularizers, config, adapter),
        warn=warn,
        # at every batch, so that a method given to the instance later counts too
        extend=lambda batch: host.extend_ba_lora_inputs(batch),
        to_device=lambda batch: host._prepare_inputs(batch),
        packing=PackingProbe(bare, warn) if config.task == "nlg" else None,
        task_form=task_form_of(host.args, host.ba_lora_loss_type),
        teacher=_ready_teacher(host, bare, config, second),
        adapted=what_is_adapted(host.model) if isinstance(adapter, LoraConfig) else None,
    )
    if run.ours:
        adapter.regularizers = regularizers  # what is used is what the adapter's file says
    how = getattr(adapter, "compile", False) or given.backend is not None
    if config.task == "nlu":
        classification.set_up(run, host, compiled=how)
    if how:
        run.compiled = compiled_passes(host.args, warn, how, None if given.backend is None else given.backend.mode)
        check_compiled_once(host.accelerator, how)
    if run.ours:
        provenance.prepare(host.model, provenance.teacher_in_words(config, run.teacher))
        run.callbacks.append(CardMetrics(run))
    _open_data(run, host)
    run.shared, run.by_layer = layers_to_share(run, host.args), teacher_by_layer(run, host.args)
    warn_at_set_up(run, host.args)
    run.callbacks += [BeforeTraining(run, host), Banner(run), Resumed(run), NothingLeft(run), EarlierRuns(run, host)]
    run.callbacks += [SettingWeights(run, host)] * bool(run.own.rules)
    run.first_norms = FirstNorms.of(adapter, host.args, warn)
    run.callbacks += [FiniteGuard(run, host), RecordedTerms(run, host)]
    logger.info(f"BA-LoRA: {config}")
    return run


def _open_data(run: RunState, host: HostTrainer) -> None:
    """What the consistency term reads beside the training data: the teacher's outputs, and anchors."""
    config = run.config
    if config.teacher_cache is not None and config.lambda_consistency:
        open_run_cache(run, host)
    if config.anchor_data is not None and config.anchor_fraction:
        open_run_anchors(run, host)


def _terms_of(adapter: Any, given: Given) -> RegularizerConfig | None:
    """The terms that the trainer was given, or that its adapter carries."""
    regularizers = given.regularizers
    if regularizers is None and isinstance(adapter, BaLoraConfig):
        regularizers = adapter.regularizers
    if regularizers is None:
        if given.teacher_model is not None:
            raise ValueError("teacher_model is given, but no terms: pass regularizers=RegularizerConfig(...) too.")
        return None
    regularizers = as_regularizers(regularizers)
    if isinstance(given.teacher_model, (str, os.PathLike)):
        raise TypeError(
            f"teacher_model={given.teacher_model!r} must be a loaded model: pass "
            f"AutoModelForCausalLM.from_pretrained({os.fspath(given.teacher_model)!r})."
        )
    return regularizers


def _check(
    host: BaLoraHost, bare: Any, adapter: Any, regularizers: RegularizerConfig, given: Given
) -> RegularizerConfig:
    """Refuses what cannot work; the settings in force for this model."""
    check_arguments(host.args)
    if isinstance(adapter, BaLoraConfig):
        check_saving(host.accelerator)
    check_loss_function(getattr(host, "compute_loss_func", None), task_form_of(host.args, host.ba_lora_loss_type))
    check_unpatched(host.model)
    check_adapters(bare)
    check_attention(bare, host.args)
    config = resolve(bare, regularizers)
    if config.lambda_consistency:
        check_teacher(adapter, given.teacher_model, cached=config.teacher_cache is not None, model=bare)
    host.check_ba_lora_task(config)
    return config


def _ready_teacher(host: HostTrainer, bare: Any, config: RegularizerConfig, teacher: nn.Module | None) -> Any:
    """A second model as teacher: checked, frozen, in eval mode, on the trainer's device."""
    if isinstance(teacher, PeftModel):
        teacher = teacher.get_base_model()  # its adapters live in the module tree
    if teacher is not None:
        check_loaded(  # no engine splits it, so none sends it either
            teacher.parameters(),
            f"teacher_model={type(teacher).__name__} is loaded on one process alone, and the others would be taught by "
            "zeros: switch FSDP's cpu_ram_efficient_loading off.",
        )
        if config.task == "nlg":
            check_head(teacher)
        check_same_attention(bare, teacher)
        give_kernels(teacher, host.args)
        teacher.requires_grad_(False).eval().to(host.args.device)
    return teacher
