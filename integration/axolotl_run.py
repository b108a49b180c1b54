"""Axolotl's own training code, in this process (imports are slow)."""

from __future__ import annotations

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import train


def run(path):
    """What `axolotl train` does with a YAML, returning its trainer."""
    cfg = load_cfg(str(path))
    data = PluginManager.get_instance().load_datasets(cfg, preprocess=False)
    _, _, trainer = train(cfg=cfg, dataset_meta=data or load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    return trainer


def history(trainer, key):
    return [row[key] for row in trainer.state.log_history if key in row]
