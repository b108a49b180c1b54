"""ba_lora.json: written with the hashes of the files beside it, read back as a plain dict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..atomic import write_text
from ..distributed import ranks_here
from .location import AdapterFiles
from .names import FORMAT_VERSION, SETTINGS_FILE


def write_settings(directory: str, settings: Mapping[str, Any], hashes: Mapping[str, str] | None = None) -> None:
    """Writes ba_lora.json; without `hashes` it says that no weights stand beside it yet.

    Args:
        directory: Where the adapter is.
        settings: What the file says of the adapter: `BaLoraConfig.to_settings()`, and where it came from.
        hashes: SHA-256 of the files beside it, by name.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "balora_plugin_version": __version__,
        **settings,
        "ranks": ranks_here(),
        "sha256": dict(hashes or {}),
    }
    write_text(Path(directory, SETTINGS_FILE), json.dumps(content, indent=2))


def read_settings(files: AdapterFiles) -> dict[str, Any] | None:
    """Returns what ba_lora.json of an adapter says, or None for an adapter that is not ours.

    Raises:
        ValueError: a damaged file, or a format version this release does not know.
    """
    path = files.find(SETTINGS_FILE)
    if path is None:
        return None
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not JSON: the file was cut short or edited; use another checkpoint.") from None
    if settings.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={settings.get('format_version')!r} is not {FORMAT_VERSION}: "
            "it was written by another release of balora-plugin; upgrade with pip install -U balora-plugin."
        )
    return settings


def changed_files(settings: Mapping[str, Any], files: AdapterFiles) -> dict[str, str]:
    """Returns {name: "is missing" or "is not the file that was saved"} of the files it has a hash of."""
    found = {}
    for name, digest in settings["sha256"].items():
        path = files.find(name)
        if path is None:
            found[name] = "is missing"
        elif file_digest(path) != digest:
            found[name] = "is not the file that was saved"
    return found


def file_digest(path: str | Path) -> str:
    """Returns the SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
