"""BaLoraPlugin: the hooks Axolotl calls; thin over the core's adapter and trainer mixin."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from ...adapter.build import get_ba_lora_model
from ...adapter.config import DELTA_STARTS, BaLoraConfig
from ...adapter.model import BaLoraModel
from ...checkpoint.integrity import check_whole, checkpoint_flaw, is_checkpoint, recommended
from ...checkpoint.location import AdapterFiles
from ...checkpoint.lock import only_run
from ...checkpoint.names import STATE_FILE
from ...checkpoint.settings import read_settings
from ...findings import Finding
from ...pretrained.classifier_head import is_classifier
from ...pretrained.lm_head import check_head
from ...pretrained.quantised import as_floats
from ...training.checks.model import resolve
from . import classification, fsdp, kbit
from .adapter import adapter_config, regularizers_of
from .asked import check_expert_kernel, options_of_plugins
from .block import ADAPTER, of_block
from .checks import active, findings_of, of_command_line
from .engine import attention_here, attention_setting, compiles_whole, flash_at_once, reentrant_of
from .errors import SettingError, as_setting_errors, one_line_errors, refuse
from .injection import patch_peft
from .method import spell_out
from .names import of_names
from .refusals import other_trainers, refused
from .superseded import still_on, switch_off

_KWARGS = "gradient_checkpointing_kwargs"
logger = logging.getLogger("axolotl.balora_plugin")  # below Axolotl's own, whose handlers print it


class BaLoraPlugin(BasePlugin):
    """`plugins: [balora_plugin.BaLoraPlugin]`, `adapter: ba_lora`, and a `ba_lora:` block or none."""

    _inference = False  # `axolotl inference` says so at register alone: validation drops its key
    _attention = ""  # the line about it as it was written: validation rewrites older keys

    def register(self, cfg: Any) -> None:
        """Called with the YAML as written, before validation."""
        one_line_errors()
        values = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
        found = [*of_command_line(), *self.findings(values)]
        if isinstance(values.get("ba_lora") or {}, dict) and active(values):
            found = [*flash_at_once(values, refused=bool(found)), *found]  # of two on one key the first is said
        refuse(found)
        values = spell_out(cfg, values)
        with as_setting_errors():
            if values.get("adapter") == ADAPTER:
                kbit.ask_for_quantisation(cfg)
            if classifies(cfg):
                classification.merge_by_model(cfg)
        self._inference, self._attention = bool(cfg.get("inference")), attention_setting(values)
        if active(cfg):
            switch_off(cfg)
            if cfg.get("gradient_checkpointing") and compiles_whole(values) and not reentrant_of(values):
                # Axolotl's own default is the reentrant kind, which no graph of a model can hold
                cfg["gradient_checkpointing_kwargs"] = {**(values.get(_KWARGS) or {}), "use_reentrant": False}

    @staticmethod
    def findings(values: dict[str, Any]) -> Iterator[Finding]:
        """Finds what a YAML as it was written would train otherwise than it says; needs no weights and no data."""
        yield from findings_of(values)
        yield from of_block(values.get("ba_lora"), "nlu" if classification.is_classification(values) else "nlg")
        yield from of_names(values)

    def get_input_args(self) -> str:
        return "balora_plugin.hosts.axolotl.args.BaLoraArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER, lora_like=True)]

    def pre_model_load(self, cfg: Any) -> None:
        """The final config: what Axolotl's validation and other plug-ins' defaults made of the YAML."""
        with as_setting_errors():
            if active(cfg):
                here = attention_here(cfg, self._attention or attention_setting(cfg))
                refuse([*refused(cfg), *still_on(cfg), *here, *other_trainers(cfg, BaLoraPlugin)])
                check_alone(cfg)
            if active(cfg) and cfg.adapter:
                fsdp.save_whole(cfg)
            if cfg.adapter or active(cfg):
                check_resumed(cfg)
            if cfg.adapter == ADAPTER:
                options_of_plugins(cfg)
                kbit.configure(cfg, inference=self._inference)
        if classifies(cfg):
            classification.before_loading(cfg)

    def pre_lora_load(self, cfg: Any, model: PreTrainedModel) -> None:
        if cfg.adapter == ADAPTER and not cfg.merge_lora:
            with as_setting_errors():
                kbit.prepare_base(cfg, model)

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Injects the adapter, or loads the one in `lora_model_dir`; None leaves other adapters to Axolotl."""
        if cfg.adapter != ADAPTER:
            return None
        with as_setting_errors():
            return self._load(model, cfg, inference, config_only)

    def _load(self, model: PreTrainedModel, cfg: Any, inference: bool, config_only: bool) -> tuple[Any, Any]:
        config = adapter_config(cfg, model)
        if config_only:
            return None, config
        autocast = (
            {}
            if cfg.peft_autocast_adapter_dtype is None
            else {"autocast_adapter_dtype": cfg.peft_autocast_adapter_dtype}
        )
        patch_peft(model, config)
        if is_classifier(model):
            classification.check_new_head(model)
            if cfg.merge_lora:
                classification.before_merging(model)
        if cfg.merge_lora and getattr(model, "is_quantized", False):
            kbit.check_merged(cfg, model)
            model = as_floats(model)
        if cfg.lora_model_dir:
            wrapped = BaLoraModel.from_pretrained(
                model, str(cfg.lora_model_dir), is_trainable=not inference, **autocast
            )
            config = wrapped.peft_config["default"]
            check_continued(cfg, config)
            config.regularizers = regularizers_of(cfg)  # the YAML's terms, the file's adapter
        else:
            if not inference and not cfg.merge_lora:  # before the SVDs
                terms = resolve(model, config.regularizers, adapter_follows=True)
                if terms.task == "nlg":
                    check_head(model)
            with torch.random.fork_rng():  # Axolotl seeds later: a random start would differ from run to run
                torch.manual_seed(cfg.seed if cfg.seed is not None else 42)
                wrapped = get_ba_lora_model(model, config, **autocast)
        check_expert_kernel(cfg, config.target_parameters or wrapped.peft_config["default"].target_parameters)
        if not cfg.merge_lora:
            kbit.check_quantised(cfg, wrapped, inference=self._inference)
        config.resumed_in = _resumed_in(cfg)
        return wrapped, config

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if not active(cfg):
            return None
        from .trainer import trainer_class

        terms = None if cfg.adapter == ADAPTER else regularizers_of(cfg)
        return trainer_class(terms, (cfg.get("ba_lora") or {}).get("loss_type"))

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        if not active(cfg) or not cfg.label_smoothing_factor:
            return None
        return {"label_smoothing_factor": cfg.label_smoothing_factor}

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """A classifier's data; None leaves everything else to Axolotl.

        Also the one hook between Axolotl's choice of devices and its loader, which reads them.
        """
        if not preprocess and active(cfg):
            keep_on_cpu(cfg)
        if not classifies(cfg):
            return None
        with as_setting_errors():
            return classification.load_samples(cfg)

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> Any:
        return classification.collator(cfg) if classifies(cfg) else None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if active(cfg) and getattr(trainer, "ba_lora", None) is None:
            raise SettingError(
                f"plugins: another plug-in's trainer ({type(trainer).__name__}) took the place of BA-LoRA's, so its "
                "terms would be left out: remove that plug-in, or put balora_plugin.BaLoraPlugin first."
            )
        # by the YAML, or by accelerate's own config
        if active(cfg) and cfg.adapter and (trainer.is_fsdp_enabled or fsdp.asks_for_fsdp(cfg)):
            fsdp.save_by_the_trainer(trainer.model)
        if classifies(cfg):
            classification.set_up_trainer(cfg, trainer)


def classifies(cfg: Any) -> bool:
    """True if the terms train a classifier."""
    return active(cfg) and classification.is_classification(cfg)


def keep_on_cpu(cfg: Any) -> None:
    """Of several processes Axolotl sends each to the accelerator of its rank, also where there is none (gloo ranks)."""
    if cfg.world_size not in (None, 1) and not torch.accelerator.is_available():
        cfg.device_map = {"": "cpu"}


def check_alone(cfg: Any) -> None:
    """Refuses an output directory that another run is writing to, before Axolotl writes there.

    Raises:
        ValueError: names the directory and the process.
    """
    trains = not (cfg.merge_lora or cfg.inference)
    if trains and cfg.output_dir and os.environ.get("RANK", "0") == "0":
        with only_run(str(cfg.output_dir)):  # the trainer takes it, for as long as it trains
            pass


def check_resumed(cfg: Any) -> None:
    """A checkpoint to be resumed must be whole, its adapter of the same kind; Axolotl overwrites files before it looks.

    One that a crash cut short does not hold an automatic resume up: it goes on from the last whole one.

    Raises:
        ValueError: names the key, the checkpoint and the remedy.
    """
    checkpoint = cfg.resume_from_checkpoint
    if isinstance(checkpoint, os.PathLike):
        checkpoint = cfg.resume_from_checkpoint = os.fspath(checkpoint)
    automatic = not checkpoint and bool(cfg.auto_resume_from_checkpoints) and os.path.isdir(cfg.output_dir or "")
    if automatic:
        checkpoint = get_last_checkpoint(cfg.output_dir)
    if not isinstance(checkpoint, str):
        return
    finished = os.path.isfile(os.path.join(checkpoint, STATE_FILE))  # else its adapter may be cut short too
    if finished and cfg.adapter and os.path.isfile(os.path.join(checkpoint, "adapter_config.json")):
        _check_kind(cfg, "auto_resume_from_checkpoints" if automatic else "resume_from_checkpoint", checkpoint)
    if not active(cfg):
        return
    adapters = ["default"] if cfg.adapter == ADAPTER else []
    if automatic:
        _pass_over_the_cut(cfg, checkpoint, adapters)
    else:
        check_whole(checkpoint, adapters)


def _resumed_in(cfg: Any) -> str | None:
    """Returns the output directory, where Axolotl is going to resume one of its own checkpoints; else None."""
    here = os.path.realpath(cfg.output_dir)
    checkpoint = cfg.resume_from_checkpoint
    if not checkpoint and cfg.auto_resume_from_checkpoints and os.path.isdir(here):
        checkpoint = get_last_checkpoint(here)
    return here if checkpoint and os.path.dirname(os.path.realpath(checkpoint)) == here else None


def _check_kind(cfg: Any, key: str, checkpoint: str) -> None:
    start = cfg.peft_init_lora_weights
    ours = ADAPTER if cfg.adapter == ADAPTER and (start is None or start in DELTA_STARTS) else "lora"
    settings = read_settings(AdapterFiles(checkpoint))
    theirs = ADAPTER if settings is not None and settings["delta_form"] else "lora"
    if theirs != ours:
        raise ValueError(
            f"{key}: {checkpoint} is a checkpoint of adapter: {theirs}, but the YAML trains another kind "
            f"(adapter: {cfg.adapter}): write another output_dir, or do not resume."
        )


def _pass_over_the_cut(cfg: Any, newest: str, adapters: list[str]) -> None:
    """Names the last whole checkpoint where the newest is not, before Axolotl takes the newest by itself."""
    flaw = checkpoint_flaw(newest, adapters)
    if flaw is None:
        return
    found = recommended(cfg.output_dir, adapters, but=os.path.basename(newest))
    if found.path is not None:
        cfg.resume_from_checkpoint = found.path
        logger.warning(
            "auto_resume_from_checkpoints: %s is not whole (%s): going on from %s.%s",
            newest,
            flaw,
            found.path,
            found.in_words(),
        )
        return
    if sum(map(is_checkpoint, os.listdir(cfg.output_dir))) > 1:  # not one save that was cut short
        check_whole(newest, adapters)
    cfg.auto_resume_from_checkpoints = False
    logger.warning(
        "auto_resume_from_checkpoints: %s, the only checkpoint, is not whole (%s): starting from the beginning.",
        newest,
        flaw,
    )


def check_continued(cfg: Any, config: BaLoraConfig) -> None:
    """The adapter in `lora_model_dir` has a shape of its own: a YAML that asks for another one is contradictory.

    Raises:
        ValueError: names the key, both values and the remedy.
    """
    for key, value in (("lora_r", config.r), ("lora_alpha", config.lora_alpha)):
        if cfg[key] is not None and cfg[key] != value:
            raise ValueError(
                f"{key}: {cfg[key]} contradicts the adapter in lora_model_dir: {cfg.lora_model_dir}, which has "
                f"{value}: write {key}: {value}, or remove the line."
            )
