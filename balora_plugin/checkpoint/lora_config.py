"""adapter_config.json as plain values: of a LoRA the options that are computed with are of their types."""

from __future__ import annotations

import os
from typing import Any

from .json_file import read_object
from .rules import OPTIONS, flaw


def read_adapter_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what an adapter's adapter_config.json says; another kind's than a LoRA's is not looked into.

    Raises:
        ValueError: no JSON mapping, or an option of a LoRA that is none; names the file, the key and what it has to be.
        OSError: it cannot be opened.
    """
    values = read_object(path)
    wrong = flaw(values, OPTIONS) if values.get("peft_type") == "LORA" else None
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}: copy or save the adapter again.")
    return values
