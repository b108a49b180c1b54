"""An Axolotl plug-in for test_axolotl_ranks.py: notes which rank writes which adapter, and every rank's logged rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
