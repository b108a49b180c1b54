"""Axolotl plug-ins for the tests on several ranks: what each rank writes and logs, and FSDP on a CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin

from balora_plugin.adapter import model


class RanksPlugin(BasePlugin):
    """Writes `*-rank-N.json` beside the output: the directories into which this rank wrote an adapter, its log."""

    written: list[str]

    def register(self, cfg: Any) -> None:
        self.written = []
        original = model.write_side_files

        def noted(directory: str, *args: Any) -> Any:
            self.written.append(Path(directory).name)
            return original(directory, *args)

        model.write_side_files = noted

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        self.trainer = trainer

    def post_train(self, cfg: Any, model: Any) -> None:
        found = {"written": self.written, "log": self.trainer.state.log_history}
        rank = os.environ.get("RANK", "0")
        Path(f"{cfg.output_dir}-rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


class CpuShardsPlugin(RanksPlugin):
    """FSDP on CPU ranks, as a GPU would run it: accelerate gives a CPU DDP, Axolotl asks for a mesh of CUDA devices."""

    def register(self, cfg: Any) -> None:
        super().register(cfg)
        made, mesh = PartialState.__init__, ParallelismConfig.build_device_mesh

        def as_gpus(state: PartialState, *args: Any, **kwargs: Any) -> None:
            made(state, *args, **kwargs)
            if state.distributed_type == DistributedType.MULTI_CPU:
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
                PartialState._shared_state["device"] = torch.device("cpu")

        PartialState.__init__ = as_gpus  # type: ignore[method-assign]
        ParallelismConfig.build_device_mesh = lambda self, device_type: mesh(self, "cpu")  # type: ignore[method-assign]
