"""Files of rows: JSON lines, a JSON list or CSV."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any


def read_rows(path: str, option: str) -> list[dict[str, Any]]:
    """Reads a file of rows by the end of its name: .csv, .json (a list), anything else as one JSON object a line.

    `option`: the argument that named the file, for errors.

    Raises:
        ValueError: no such file, nothing in it, or a row that is no mapping; names the line.
    """
    if not Path(path).is_file():
        raise ValueError(f"{option}: there is no file {path}.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{option}: {path} is no UTF-8 text.") from None
    if path.endswith(".csv"):
        rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
    elif path.endswith(".json"):
        rows = _parsed(text, f"{option}: {path}")
        if not isinstance(rows, list):
            raise ValueError(f"{option}: {path} holds no list of rows.")
    else:
        rows = [
            _parsed(line, f"{option}: {path}, line {number}")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    odd = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if odd is not None:
        raise ValueError(f"{option}: {path}, row {odd} is no mapping of keys to values.")
    if not rows:
        raise ValueError(f"{option}: {path} holds no row.")
    return rows


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
