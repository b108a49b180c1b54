"""Axolotl runs that kill themselves with SIGKILL, for test_axolotl_crash.py; as crash.py, one child per YAML.

`python -m integration.workers.axolotl_crash MOMENT YAML [MOMENT YAML ...]`
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Any

import torch

from balora_plugin.hosts.axolotl.plugin import BaLoraPlugin
from integration.axolotl_run import run
from integration.workers.crash import DieInStep, die_while_writing


def die_in_step() -> None:
    original = BaLoraPlugin.post_trainer_create

    def adding(self: BaLoraPlugin, cfg: Any, trainer: Any) -> None:
        original(self, cfg, trainer)
        trainer.add_callback(DieInStep())

    BaLoraPlugin.post_trainer_create = adding  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    moments, yamls = sys.argv[1::2], sys.argv[2::2]
    sys.argv = ["axolotl"]
    gc.freeze()  # as conftest.py
    for moment, path in zip(moments, yamls, strict=True):
        child = os.fork()
        if not child:
            if moment == "in_step":
                die_in_step()
            else:
                die_while_writing(moment.split("_")[1], path)
            run(path)
            os._exit(0)  # it should have died
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"{moment}: ended with status {status} instead of being killed")
