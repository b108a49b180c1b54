"""ba_lora.json: written with the hashes of the files beside it, read back as a plain dict.

Whoever wrote it: what is read has the keys and types that the rest of the package takes for granted. Keys that are not
known here are kept as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..atomic import write_text
from ..distributed import ranks_here
from .json_file import read_object
from .location import AdapterFiles
from .names import FORMAT_VERSION, SETTINGS_FILE
from .rules import FLAG, MAPPING, OPTIONS, TEXT, Rule, each, flaw, is_a, or_none

_HASH = re.compile(r"[0-9a-f]{64}")
_DTYPE = re.compile(r"(b?float|u?int|complex)\d+\w*|bool|none")  # as torch names them
_NEEDED = ("delta_form", "config", "sha256")


def _is_plain_name(value: Any) -> bool:
    """Returns whether it names a file in the adapter's own directory, on any system."""
    return isinstance(value, str) and value not in ("", ".", "..") and not re.search(r"[/\\:\x00-\x1f]", value)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and _DTYPE.fullmatch(value) is not None


def _are_digests(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("weights", "bfloat16")):
        return False
    return each(is_a(str), is_a(int))(value.get("dtypes"))


_RULES: dict[str, Rule] = {
    "balora_plugin_version": TEXT,
    "start": ("text, true or false", is_a(str, bool)),
    "delta_form": FLAG,
    "base_model": or_none(TEXT),
    "regularizers": MAPPING,
    "regularizers_in_force": MAPPING,
    "config": MAPPING,
    "base_class": or_none(TEXT),
    "base_sha256": or_none(TEXT),
    "base_dtype": or_none(("the name of a dtype", _is_dtype)),
    "base_quantization": or_none(MAPPING),
    "base_digests": or_none(("digests (weights, bfloat16, dtypes)", _are_digests)),
    "teacher": or_none(TEXT),
    "probe": or_none(MAPPING),
    "ranks": ("a list of ranks", lambda v: isinstance(v, list) and all(is_a(int)(rank) and rank >= 0 for rank in v)),
    "sha256": ("a mapping of names of files beside it to their SHA-256", each(_is_plain_name, _is_hash)),
}


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
        ValueError: a damaged file, a key of another type than it has, or a format version this release does not know;
            names the file and the key.
    """
    path = files.find(SETTINGS_FILE)
    if path is None:
        return None
    settings = read_object(path)
    if settings.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version={settings.get('format_version')!r} is not {FORMAT_VERSION}: "
            "it was written by another release of balora-plugin; upgrade with pip install -U balora-plugin."
        )
    recorded = ("base_dtype", "base_digests", "base_quantization") if settings.get("base_sha256") else ()
    found = flaw(settings, _RULES, (*_NEEDED, *recorded))
    if found is None:
        inside = flaw(settings["config"], OPTIONS)
        found = None if inside is None else f"config.{inside}"
    if found is None:
        found = next((f"{key} is null" for key in recorded[:2] if settings[key] is None), None)
    if found is not None:
        raise ValueError(f"{path}: {found}: the file was edited or damaged; use another checkpoint.")
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
