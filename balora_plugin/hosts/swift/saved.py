"""args.json, which ms-swift writes beside every adapter: what is saved is a LoRA, and needs nothing of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...atomic import write_text
from .names import PLUGIN_FILE, TUNER

ARGUMENTS = "args.json"
_PLUGINS = ("external_plugins", "custom_register_path")


def as_stock(arguments: Mapping[str, Any], plugin: str | os.PathLike[str] = PLUGIN_FILE) -> dict[str, Any]:
    """Returns the arguments of a run as those of a LoRA: `tuner_type: lora`, and other plug-ins than `plugin` alone.

    ms-swift reads both anew whenever it loads the adapter, and merges no tuner that it does not know.
    """
    stock = dict(arguments)
    if stock.get("tuner_type") == TUNER:
        stock["tuner_type"] = "lora"
    ours = os.path.realpath(plugin)
    for key in _PLUGINS:
        files = stock.get(key)
        if isinstance(files, list):
            stock[key] = [file for file in files if os.path.realpath(os.path.expanduser(str(file))) != ours]
    return stock


def write_as_stock(directory: str | os.PathLike[str]) -> None:
    """Rewrites the args.json of an output directory, from which ms-swift copies it into each checkpoint."""
    path = Path(directory) / ARGUMENTS
    if path.is_file():
        stock = as_stock(json.loads(path.read_text(encoding="utf-8")))
        write_text(path, json.dumps(stock, ensure_ascii=False, indent=2))
