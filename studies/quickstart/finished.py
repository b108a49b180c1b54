"""Results of finished runs, kept beside the adapters: what has not changed is not run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import balora_plugin
from balora_plugin.atomic import write_text


def digest(**parts: Any) -> str:
    """16 hex digits that change with any of the parts, and with the code of the plug-in or of the quickstart."""
    content = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for root in (Path(balora_plugin.__file__).parent, Path(__file__).parent):
        for path in sorted(root.rglob("*.py")):
            content.update(path.read_bytes())
    return content.hexdigest()[:16]


def once(
    path: Path, key: str, make: Callable[[], Mapping[str, Any]], again: bool = False
) -> tuple[dict[str, Any], bool]:
    """(what `make` gives, whether it was there): from the file at `path` if it was written for `key`, not `again`."""
    if path.is_file() and not again:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return kept["found"], True
    found = dict(make())
    write_text(path, json.dumps({"key": key, "found": found}, indent=2) + "\n")
    return found, False
