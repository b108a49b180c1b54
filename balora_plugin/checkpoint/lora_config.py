"""adapter_config.json as plain values: of a LoRA the options that are computed with are of their types."""

from __future__ import annotations

import os
from typing import Any

from .json_file import read_object
from .rules import OPTIONS, flaw

_NEEDED = ("r", "lora_alpha")  # PEFT writes them always; for what is missing it would take values of its own


def read_adapter_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what an adapter's adapter_config.json says; another kind's than a LoRA's is not looked into.

    Raises:
        ValueError: no JSON mapping, no peft_type, or an option of a LoRA that is missing or none; names the file, the
            key and what it has to be.
        OSError: it cannot be opened.
    """
    values = read_object(path)
    kind = values.get("peft_type")
    wrong = None if isinstance(kind, str) else f"peft_type is {'missing' if kind is None else repr(kind)[:60]}"
    if kind == "LORA":
        wrong = flaw(values, OPTIONS, _NEEDED)
    if wrong is not None:
        raise ValueError(f"{path}: {wrong}: copy or save the adapter again.")
    return values
