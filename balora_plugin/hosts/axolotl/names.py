"""Names of layers that a YAML asks for and its base model does not have, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from axolotl.utils.dict import DictDefault

from ...adapter.target_names import check_names
from ...findings import Finding
from .adapter import adapter_config
from .block import ADAPTER
from .shapes import base_as_shapes, precision_loaded


def of_names(values: dict[str, Any]) -> Iterator[Finding]:
    """Finds targets of which none is in the base model, by its config; warns of single ones.

    Nothing where the config cannot be read, or where no model is made of it by shapes alone.
    """
    if values.get("adapter") != ADAPTER or values.get("lora_model_dir") or not values.get("base_model"):
        return
    try:
        cfg = DictDefault(values)
        base = base_as_shapes(cfg, precision_loaded(cfg))
        config = adapter_config(cfg, base)
    except Exception:  # what is wrong with either is said where it is used
        return
    try:
        check_names(config, base)
    except ValueError as error:
        found = Finding.of_error(str(error))
        yield found._replace(key=f"lora_{found.key}" if found.key else "lora_target_modules")
