"""FSDP in Axolotl: whichever of its paths saves, the adapter is written whole and by its own writer."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from functools import wraps
from typing import Any
from weakref import WeakSet

import axolotl
from torch import nn

from ...findings import Finding
from .classification import is_classification

logger = logging.getLogger("axolotl.balora_plugin")
_HOME, _WRITER = "axolotl.integrations.expert_parallel.shard", "save_fsdp2_lora_adapter"
_saved_by_trainer: WeakSet[nn.Module] = WeakSet()


def asks_for_fsdp(data: Any) -> bool:
    """Whether a YAML, written or validated, runs under FSDP."""
    return bool(data.get("fsdp") or data.get("fsdp_config"))


def of_fsdp(data: dict[str, Any]) -> Iterator[Finding]:
    """Finds what of FSDP no adapter could be saved with, or resumed."""
    if not asks_for_fsdp(data):
        return
    config = data.get("fsdp_config") or {}
    for key in ("state_dict_type", "fsdp_state_dict_type"):
        if config.get(key) == "LOCAL_STATE_DICT":
            why = "leaves the optimizer's state in parts that only the same processes could read"
            remedy = "write SHARDED_STATE_DICT or FULL_STATE_DICT (the adapter is saved whole with either)"
            yield Finding(f"fsdp_config.{key}", config[key], why, remedy, False)
    versions = (data.get("fsdp_version"), config.get("fsdp_version"), config.get("version"))
    version = next((str(given) for given in versions if given), "1")
    if is_classification(data) and (version != "2" or data.get("adapter") != "ba_lora"):
        why = f"with adapter: {data.get('adapter')} does not restore the head of a classifier's teacher"
        remedy = "write fsdp_version: 2 and adapter: ba_lora, or leave FSDP out (several GPUs train it with DDP)"
        yield Finding("fsdp_version", version, why, remedy, False if data.get("adapter") == "ba_lora" else None)


def save_whole(cfg: Any) -> None:
    """At pre_model_load: the final adapter is whole, also where checkpoints are sharded (in place).

    Axolotl would merge the last checkpoint's shards over it, which hold what trains alone.
    """
    config = cfg.fsdp_config
    if not config:
        return
    if "SHARDED_STATE_DICT" in (config.final_state_dict_type, config.state_dict_type):
        logger.info(
            "BA-LoRA: adapters are saved whole, in checkpoints and at the end: SHARDED_STATE_DICT applies to the "
            "optimizer's state alone"
        )
    config["final_state_dict_type"] = "FULL_STATE_DICT"


def save_by_the_trainer(model: nn.Module) -> None:
    """Keeps Axolotl's own writer of adapters under FSDP2 off `model`, so that its trainer's save_model saves it.

    That writer takes lora_A and lora_B out of the model by name: half of the delta form, and no modules_to_save. It
    answers whether it has saved; where it has not, Axolotl calls save_model.

    Raises:
        ImportError: this Axolotl has no such writer, and may have another.
    """
    try:  # here, so that an Axolotl without it trains by every other engine
        shard = importlib.import_module(_HOME)
    except ImportError:
        shard = None
    theirs = getattr(shard, _WRITER, None)
    if theirs is None:
        raise ImportError(
            f"axolotl {axolotl.__version__} has no {_WRITER}: FSDP with BA-LoRA needs axolotl 0.19, or a newer "
            "balora-plugin; DDP and DeepSpeed work."
        )
    _saved_by_trainer.add(model)
    if hasattr(theirs, "__wrapped__"):
        return

    @wraps(theirs)
    def writer(model: nn.Module, output_dir: str) -> bool:
        return False if model in _saved_by_trainer else bool(theirs(model, output_dir))

    setattr(shard, _WRITER, writer)
