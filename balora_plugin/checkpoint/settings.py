"""ba_lora.json: written with the hashes of the files beside it, read back as a plain dict.

Whoever wrote it: what is read has the keys and types that the rest of the package takes for granted. Keys that are not
known here are kept as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..atomic import write_text
from ..distributed import ranks_here
from .json_file import read_object
from .location import AdapterFiles
from .names import FORMAT_VERSION, SETTINGS_FILE

Rule = tuple[str, Callable[[Any], bool]]  # what a value has to be, in words and as a question

_HASH = re.compile(r"[0-9a-f]{64}")
_NEEDED = ("delta_form", "config", "sha256")


def _is(*kinds: type) -> Callable[[Any], bool]:
    """Returns whether a value is of these types; True and False are no numbers."""
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _each(keys: Callable[[Any], bool], values: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(keys(k) and values(v) for k, v in value.items())


def _is_plain_name(value: Any) -> bool:
    """Returns whether it names a file in the adapter's own directory, on any system."""
    return isinstance(value, str) and value not in ("", ".", "..") and not re.search(r"[/\\:\x00-\x1f]", value)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _are_digests(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("weights", "bfloat16")):
        return False
    return _each(_is(str), _is(int))(value.get("dtypes"))


def _or_none(rule: Rule) -> Rule:
    return f"{rule[0]} or null", lambda value: value is None or rule[1](value)


_TEXT: Rule = ("text", _is(str))
_FLAG: Rule = ("true or false", _is(bool))
_MAPPING: Rule = ("a mapping", _is(dict))
_RULES: dict[str, Rule] = {
    "balora_plugin_version": _TEXT,
    "start": ("text, true or false", _is(str, bool)),
    "delta_form": _FLAG,
    "base_model": _or_none(_TEXT),
    "regularizers": _MAPPING,
    "regularizers_in_force": _MAPPING,
    "config": _MAPPING,
    "base_class": _or_none(_TEXT),
    "base_sha256": _or_none(_TEXT),
    "base_dtype": _or_none(_TEXT),
    "base_quantization": _or_none(_MAPPING),
    "base_digests": _or_none(("digests (weights, bfloat16, dtypes)", _are_digests)),
    "teacher": _or_none(_TEXT),
    "probe": _or_none(_MAPPING),
    "ranks": ("a list of ranks", lambda v: isinstance(v, list) and all(_is(int)(rank) and rank >= 0 for rank in v)),
    "sha256": ("a mapping of names of files beside it to their SHA-256", _each(_is_plain_name, _is_hash)),
}
_NAMES: Rule = (
    "text, or a list of texts",
    lambda v: isinstance(v, str) or (isinstance(v, list) and all(isinstance(name, str) for name in v)),
)
_CONFIG_RULES: dict[str, Rule] = {  # of its options those that loading does arithmetic or matching with
    "r": ("a whole number >= 1", lambda v: _is(int)(v) and v >= 1),
    "lora_alpha": ("a number > 0", lambda v: _is(int, float)(v) and 0 < v < float("inf")),
    "lora_dropout": ("a number from 0 to 1", lambda v: _is(int, float)(v) and 0 <= v <= 1),
    "use_rslora": _FLAG,
    "init_lora_weights": ("text, true or false", _is(str, bool)),
    "base_model_name_or_path": _or_none(_TEXT),
    "task_type": _or_none(_TEXT),
    "target_modules": _or_none(_NAMES),
    "exclude_modules": _or_none(_NAMES),
    "target_parameters": _or_none(_NAMES),
    "modules_to_save": _or_none(_NAMES),
    "rank_pattern": _or_none(("ranks by name", _each(_is(str), lambda v: _is(int)(v) and v >= 1))),
    "alpha_pattern": _or_none(("numbers > 0 by name", _each(_is(str), lambda v: _is(int, float)(v) and v > 0))),
    "regularizers": _MAPPING,
    "start_from": _or_none(_TEXT),
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
    flaw = _flaw(settings, _RULES, (*_NEEDED, *recorded)) or _flaw(settings["config"], _CONFIG_RULES, (), "config.")
    if flaw is None:
        flaw = next((f"{key} is null" for key in recorded[:2] if settings[key] is None), None)
    if flaw is not None:
        raise ValueError(f"{path}: {flaw}: the file was edited or damaged; use another checkpoint.")
    return settings


def _flaw(values: Mapping[str, Any], rules: Mapping[str, Rule], needed: Sequence[str], inside: str = "") -> str | None:
    """Returns which key is missing, or what it is instead of what it has to be; None if all is well."""
    for key, (words, holds) in rules.items():
        if key not in values:
            if key in needed:
                return f"{inside}{key} is missing"
        elif not holds(values[key]):
            return f"{inside}{key} is {repr(values[key])[:60]}, not {words}"
    return None


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
