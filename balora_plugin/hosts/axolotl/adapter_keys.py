"""Keys of the adapter that Axolotl does not have: it ignores them, so that a misspelt one trains something else."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterator, Set
from typing import Any

from axolotl.integrations.base import load_plugin
from axolotl.utils.schemas.config import AxolotlInputConfig
from peft import LoraConfig

from ...findings import Finding

_PREFIXES = ("lora_", "peft_")
_OTHER_NAMES = {"rank": "r", "target_module": "target_modules", "targets": "target_modules"}
# what is written without a prefix, or in a PEFT config
_BARE = {field.name for field in dataclasses.fields(LoraConfig)} | {"alpha", "dropout", "rank", "target_linear"}


def of_adapter_keys(data: dict[str, Any]) -> Iterator[Finding]:
    """Finds `lora_*` and `peft_*` keys, and PEFT's own names, that neither Axolotl nor a plug-in of the YAML reads."""
    written = {
        key: key.lower().replace("-", "_")
        for key, value in data.items()
        if isinstance(key, str) and key not in AxolotlInputConfig.model_fields and value not in (None, False, [], {})
    }
    unknown = {key: name for key, name in written.items() if name.startswith(_PREFIXES) or name in _BARE}
    if not unknown:
        return
    known = _known(data.get("plugins") or [])
    if known is None:
        return
    for key, name in unknown.items():
        if key in known:
            continue
        near = _nearest(name, {field for field in known if field.startswith((*_PREFIXES, "loraplus_"))})
        if near is None and (isinstance(data[key], dict) or not name.startswith(_PREFIXES)):
            continue  # settings that are shared by a YAML's anchor; or PEFT has it, and no key of Axolotl's means it
        hint = f"did you mean {near}?" if near else "remove it"
        yield Finding(key, repr(data[key]), "is not a key of Axolotl, which ignores it", hint)


def _known(plugins: Any) -> set[str] | None:
    """Every key that Axolotl takes with these plug-ins; None where one does not load, which Axolotl says itself."""
    known = set(AxolotlInputConfig.model_fields)
    for plugin in [plugins] if isinstance(plugins, str) else plugins:
        try:
            module, _, name = (load_plugin(plugin).get_input_args() or "").rpartition(".")
            known |= set(getattr(importlib.import_module(module), name).model_fields) if name else set()
        except Exception:  # of any kind: it is another's code
            return None
    return known


def _nearest(name: str, known: Set[str]) -> str | None:
    """Returns the key that a misspelt one most likely means: by prefix, by another name of it, or by its letters."""
    bare = name[len(_PREFIXES[0]) :] if name.startswith(_PREFIXES) else name
    for each in (bare, _OTHER_NAMES.get(bare, bare)):
        for prefix in _PREFIXES:
            if prefix + each in known:
                return prefix + each
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75) if name.startswith(_PREFIXES) else []
    return near[0] if near else None
