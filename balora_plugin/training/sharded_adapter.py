"""Saving and resuming under FSDP and DeepSpeed: the adapter's own files hold it whole, which the engine's do not.

They have what trains, without A0 and B0, and FSDP2's are loaded by the first rank alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.utils import load_peft_weights
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from ..adapter.config import BaLoraConfig, active_config
from ..adapter.delta import FROZEN, PEFT_PREFIX, unwrapped_name
from ..adapter.saved.reading import read_factors
from ..checkpoint.names import HEAD_FILE, INIT_FILE
from ..pretrained.classifier_head import wrapped_heads
from ..pretrained.quantised_experts import left_out_of_state_dicts
from .host import HostTrainer
from .several_adapters import load_adapters

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class LoadsAdapterItself(_Base):
    """Of a Trainer: loads the adapters that its host does not load, or not right.

    Under FSDP the host gives the adapter's tensors to the first rank alone, and on the others fails at modules_to_save:
    [`RestoreAdapter`] loads them. Of several adapters, or one of another name than `default`, see [`load_adapters`].
    """

    def _restores_adapter(self) -> bool:
        return bool(self.is_fsdp_enabled and isinstance(active_config(self.model), BaLoraConfig))

    def _loads_adapters(self, directory: str | None) -> bool:
        """Whether the adapters are loaded without the host: by RestoreAdapter later, or by now."""
        if self._restores_adapter():
            return True
        engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return directory is not None and not engine and load_adapters(self.model, directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads the model of a checkpoint as the host does, but no sharded adapter of ours, and of several each."""
        if not self._loads_adapters(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Loads the best checkpoint's model as the host does, but no sharded adapter of ours, and of several each."""
        if not self._loads_adapters(self.state.best_model_checkpoint):
            super()._load_best_model()


class RestoreAdapter(TrainerCallback):
    """Acts once the host has loaded: before the first step of a resumed run, and for the best checkpoint at the end."""

    def __init__(self, host: HostTrainer, resumed: str | None) -> None:
        self._host = host
        self.resumed = resumed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resumed is not None:
            self._restore(self.resumed)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore(state.best_model_checkpoint)

    def _restore(self, directory: str) -> None:
        host = self._host
        for name in host.model.active_adapters:
            where = directory if name == "default" else os.path.join(directory, name)
            if host.is_fsdp_enabled:
                restore(host.model, name, where, wrapped=host.model_wrapped)
            elif host.is_deepspeed_enabled:  # its own file has what trains, and a copy of it in the optimizer
                restore(host.model, name, where, frozen_alone=True)


@torch.no_grad()
def restore(
    model: PeftModel, adapter_name: str, directory: str, *, wrapped: nn.Module | None = None, frozen_alone: bool = False
) -> None:
    """Writes the adapter in `directory` into a model whose parameters an engine has split over the ranks.

    Every rank calls it and reads the files. `wrapped`: the model as FSDP1 runs it. `frozen_alone`: A0, B0 and the head
    of a classifier's teacher.

    Raises:
        ValueError: the files are not those of this adapter.
    """
    values = _tensors(model, adapter_name, directory)
    gathered = (
        FullyShardedDataParallel.summon_full_params(wrapped, writeback=True)
        if isinstance(wrapped, FullyShardedDataParallel)
        else nullcontext()
    )
    with gathered:
        parameters = {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}
        frozen = _frozen_part(model)
        for name, value in values.items():
            if not frozen_alone or frozen(name):
                _write(parameters[name], value)


@contextmanager
def whole_state_dict(accelerator: Any, model: nn.Module) -> Iterator[None]:
    """Inside: under FSDP a Trainer's save_model gathers the model and saves it, as without FSDP.

    Where its checkpoints are sharded (`SHARDED_STATE_DICT`) it would write no adapter, and say nothing. Quantised
    experts, which no adapter's file holds, are left out of what is gathered: FSDP2 fails at their names.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        with left_out_of_state_dicts(model):
            yield
    finally:
        plugin.state_dict_type = kind


def _frozen_part(model: nn.Module) -> Callable[[str], bool]:
    """Returns what says of a parameter's name whether it is frozen, and in the adapter's files.

    That is A0, B0 and the head of a classifier's teacher; not the first copies of a language model's embeddings.
    """
    heads = wrapped_heads(model.get_base_model()) if isinstance(model, PeftModel) else ()
    teachers = tuple(f"{PEFT_PREFIX}{name}.original_module." for name in heads)
    return lambda name: name.startswith(teachers) or any(f".{attribute}." in name for attribute in FROZEN)


def untrained_tensors(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """{name in the state dict: the tensor, whole, on the CPU} of what ZeRO-3 has split of an adapter's frozen part.

    That is A0, B0 and the head of a classifier's teacher; empty where nothing is split.

    The state dict that ZeRO-3 gathers for a save leaves out what is frozen. Every rank calls this; one that does not
    `keep` gets an empty dict. One factor at a time is whole.
    """
    found, frozen = {}, _frozen_part(model)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") and frozen(name):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                if keep:
                    found[name] = parameter.detach().cpu().clone()
    return found


def _tensors(model: PeftModel, adapter_name: str, directory: str) -> dict[str, Tensor]:
    """{the model's name of a parameter: its whole value}, of everything that the adapter's files hold."""
    weights = load_peft_weights(directory, device="cpu")
    config = model.peft_config[adapter_name]
    values: dict[str, Tensor] = {}
    if isinstance(config, BaLoraConfig) and config.delta:
        init = os.path.join(directory, INIT_FILE)
        _, factors = read_factors(model, adapter_name, weights, init)
        for layer, tensors in factors.items():
            values |= {f"{layer}.{attribute}.{adapter_name}.weight": value for attribute, value in tensors.items()}
    else:
        for key, value in weights.items():
            if ".lora_" in key:
                owner, _, leaf = key.rpartition(".")
                values[f"{owner}.{adapter_name}.{leaf}"] = value
    for name, module in model.named_modules():
        name = unwrapped_name(name)
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for leaf, _ in module.modules_to_save[adapter_name].named_parameters():
                leaf = unwrapped_name(leaf)
                values[f"{name}.modules_to_save.{adapter_name}.{leaf}"] = weights[f"{name}.{leaf}"]
    return values | _teacher_head(model, os.path.join(directory, HEAD_FILE))


def _teacher_head(model: PeftModel, path: str) -> dict[str, Tensor]:
    """{the model's name of a parameter: its value} of a classifier's teacher; empty where none was saved."""
    saved = load_file(path) if os.path.isfile(path) else {}
    return {
        f"{PEFT_PREFIX}{name}.original_module.{leaf}": saved[f"{name}.{leaf}"]
        for name, module in (wrapped_heads(model.get_base_model()) if saved else {}).items()
        for leaf, _ in module.original_module.named_parameters()
    }


def _write(parameter: Tensor, value: Tensor) -> None:
    if hasattr(parameter, "ds_id"):  # ZeRO-3: gathered, written by one rank, split again
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.data.copy_(value)
    elif isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    else:
        parameter.data.copy_(value)
