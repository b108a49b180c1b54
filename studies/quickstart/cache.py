"""Keeps the pre-trained base model in a folder named by everything that it depends on, written in one step."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

KEYED_LIBRARIES = ("torch", "transformers", "tokenizers")
MANIFEST = "quickstart.json"


def environment() -> dict[str, str]:
    """Versions that decide the corpus (Python) and the numerics and file formats (libraries)."""
    return {"python": platform.python_version()} | {library: version(library) for library in KEYED_LIBRARIES}


def cache_key(settings: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """16 hex digits that change with any setting or version, but not with the order in which they are given."""
    content = json.dumps({"settings": dict(settings), "versions": dict(versions)}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary folder beside `target` and renames it to `target` once it is complete.

    An interrupted run leaves no half-written `target`. If another process finished first, its folder stays: equal
    keys mean equal content.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(temporary)
        os.chmod(temporary, 0o755)  # mkdtemp makes it private; a cache may be shared
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cached_folder(cache_dir: Path, settings: Mapping[str, Any], write: Callable[[Path], None]) -> tuple[Path, bool]:
    """(folder with the content for `settings`, whether it was there already); `write` fills it where it was not."""
    versions = environment()
    folder = cache_dir / cache_key(settings, versions)
    if (folder / MANIFEST).is_file():
        return folder, True

    def write_with_manifest(temporary: Path) -> None:
        write(temporary)
        manifest = {"settings": dict(settings), "versions": versions}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")

    write_atomically(folder, write_with_manifest)
    return folder, False
