"""Refusals of a host's arguments and checkpoints that BA-LoRA cannot train with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ...adapter.config import BaLoraConfig
from ...checkpoint.location import AdapterFiles
from ...checkpoint.names import INIT_FILE, STATE_FILE
from ...checkpoint.settings import read_settings
from ...config import RegularizerConfig
from ...fused.loss import TaskForm
from ..task_form import task_form_of


def check_arguments(args: Any) -> None:
    """Refuses training arguments that would replace or bypass the loss.

    Raises:
        ValueError: names the argument, its value and what to write.
    """
    task_form_of(args)
    if getattr(args, "n_gpu", 1) > 1:
        raise ValueError(
            f"n_gpu={args.n_gpu}: nn.DataParallel is not supported. Launch with `accelerate launch` or `torchrun`, or "
            "show one GPU with CUDA_VISIBLE_DEVICES."
        )
    parallelism = getattr(args, "parallelism_config", None)
    for key in ("cp_enabled", "sp_enabled", "tp_enabled"):
        if getattr(parallelism, key, False):
            raise ValueError(f"parallelism_config.{key}=True does not work with BA-LoRA yet: use DDP or FSDP.")


def check_loss_function(function: Any, form: TaskForm) -> None:
    """Refuses a loss of somebody else's; `form`: what the arguments ask, for which TRL 1.9 sets a function of its own.

    Raises:
        ValueError: names the argument and what to do.
    """
    if function is None or (form.dft and getattr(function, "__module__", "").startswith("trl.")):
        return
    raise ValueError("compute_loss_func does not work with BA-LoRA, whose loss it would replace: remove it.")


def check_compiled_once(accelerator: Any, how: bool | str) -> None:
    """Refuses to compile what accelerate compiles as well; `how`: that the run compiles, as the adapter's `compile`.

    Raises:
        ValueError: names what asked for it and what to write.
    """
    plugin = getattr(accelerator.state, "dynamo_plugin", None)
    backend = str(getattr(getattr(plugin, "backend", None), "value", "NO"))
    if how and backend.upper() != "NO":
        raise ValueError(
            f"ACCELERATE_DYNAMO_BACKEND={backend.lower()} (in the environment, or accelerate's dynamo_config) and "
            f"compile={how!r} would compile the model twice: set it to no."
        )


def check_saving(accelerator: Any) -> None:
    """Refuses the way to save under FSDP that leaves a part with each process, from which no run is resumed.

    Raises:
        ValueError: names the key and what to write.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    kind = str(getattr(plugin, "state_dict_type", ""))
    if "LOCAL" in kind:
        raise ValueError(
            f"fsdp_state_dict_type={kind.rpartition('.')[2]} leaves the optimizer's state in parts that only the same "
            "processes could read: write fsdp_state_dict_type: SHARDED_STATE_DICT, or FULL_STATE_DICT (the adapter is "
            "saved whole with either)."
        )


_OF_ANY_ADAPTER = ("adapter_config.json", STATE_FILE)  # of a checkpoint that a Trainer has finished


def check_checkpoint(adapter: Any, directory: str) -> None:
    """Refuses to resume a BA-LoRA checkpoint into a plain LoRA: its optimizer state is that of rank r, its file of 2r.
    And the reverse.

    Raises:
        ValueError: names the checkpoint and the remedy.
    """
    settings = read_settings(AdapterFiles(directory)) if os.path.isdir(directory) else None
    has = {name: os.path.isfile(os.path.join(directory, name)) for name in (*_OF_ANY_ADAPTER, INIT_FILE)}
    if settings is None and all(has[name] for name in _OF_ANY_ADAPTER) and not has[INIT_FILE]:
        if isinstance(adapter, BaLoraConfig) and adapter.delta:
            raise ValueError(
                f"{directory} is a checkpoint of another adapter than BA-LoRA, which this run trains: resume one of a "
                "BA-LoRA run, or start with another output_dir."
            )
        return
    if settings is None or not settings["delta_form"] or (isinstance(adapter, BaLoraConfig) and adapter.delta):
        return
    raise ValueError(
        f"{directory} is a BA-LoRA checkpoint, but this trainer's adapter is {type(adapter).__name__}: resume it with "
        "peft_config=BaLoraConfig.from_pretrained(checkpoint). (PeftModel.from_pretrained loads it as a plain LoRA, to "
        "start a new run from.)"
    )


def check_kind(model: Any, directory: str) -> None:
    """Refuses to resume a checkpoint of an adapter without one, and one of a whole model with an adapter.

    Raises:
        ValueError: names the checkpoint and what it is of.
    """
    if not os.path.isfile(os.path.join(directory, STATE_FILE)):
        return  # not whole: that is said elsewhere
    adapters = any(Path(directory).glob("adapter_config.json")) or any(Path(directory).glob("*/adapter_config.json"))
    whole = any(Path(directory).glob("model*.safetensors"))
    if isinstance(model, PeftModel) and whole and not adapters:
        raise ValueError(
            f"{directory} is a checkpoint of full fine-tuning, but this trainer's model has an adapter: load the model "
            "from it and start a new run, or resume without peft_config."
        )
    if not isinstance(model, PeftModel) and adapters:
        raise ValueError(
            f"{directory} is a checkpoint of an adapter, but this trainer's model has none: resume it with the "
            "peft_config that it was trained with."
        )


def check_classifier_run(
    model: PreTrainedModel, config: RegularizerConfig, args: Any, *, compiled: bool | str, fsdp: bool, deepspeed: bool
) -> None:
    """Refuses what does not go together in a classification run.

    `fsdp`, `deepspeed`: it runs on an engine under which the teacher's head would not come back.

    Raises:
        ValueError: names the key, its value and what to write.
    """
    if fsdp or deepspeed:  # a resumed run would give the teacher another random head
        key = "deepspeed" if deepspeed else "fsdp"
        given = getattr(args, key, None)
        raise ValueError(
            f"{key}={given if isinstance(given, str) and given else True!r} does not work with task='nlu' here: the "
            f"teacher's head is restored with a BaLoraConfig adapter alone, under FSDP2 or DeepSpeed. Use one "
            f"{'' if deepspeed else '(and fsdp_version 2)'}, or leave {key} out (also of accelerate's config) and use "
            "DDP."
        )
    if compiled:
        raise ValueError(f"compile={compiled!r} is for causal language models: leave it out for a classifier.")
    if not config.head_warmup_steps:
        return
    if getattr(args, "ddp_find_unused_parameters", None) is False:
        raise ValueError(
            f"head_warmup_steps={config.head_warmup_steps} leaves the adapter without gradients for that long, which "
            "ddp_find_unused_parameters=False does not allow: set it to True, or leave it out."
        )
