"""Baselines and ablations by one key each: what `method` and `terms` of the `ba_lora:` block stand for.

Imports nothing heavy; a YAML without the two keys stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...config import TERMS
from ...findings import Finding
from ...weights.off import switched_off
from .block import ADAPTER, METHOD_CHOICES, TERMS_CHOICES


def spelled_out(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a YAML in which the keys stand that `method` and `terms` stand for; the same object where neither is.

    `method`: `ba_lora` changes nothing; `pissa` and `lora` are its two starts without terms; `dora` is PEFT's own DoRA
    and `full` trains every weight, both without terms. `terms` says otherwise: `all` of them as they are weighted,
    `none`, or one alone; what sets or serves the weight of another goes with it. What is neither is left where it is,
    for the block's own check to name.
    """
    block = values.get("ba_lora")
    if not isinstance(block, dict) or not {"method", "terms"} & block.keys():
        return values
    if block.get("method", "ba_lora") not in (*METHOD_CHOICES, None) or block.get("terms") not in (
        *TERMS_CHOICES,
        None,
    ):
        return values
    changed = {key: value for key, value in values.items() if key != "ba_lora"}
    block = {key: value for key, value in block.items() if key not in ("method", "terms")}
    method, terms = values["ba_lora"].get("method") or "ba_lora", values["ba_lora"].get("terms")
    terms = terms or ("all" if method == "ba_lora" else "none")
    if method in ("lora", "pissa"):
        start = changed.get("peft_init_lora_weights")
        changed["peft_init_lora_weights"] = True if method == "lora" else "pissa" if start in (True, None) else start
    elif method == "dora":
        changed |= {"adapter": "lora", "peft_use_dora": True}
        changed.pop("peft_init_lora_weights", None)
        block["apply_to"] = "lora"
    elif method == "full":
        adapters = [key for key in changed if key.startswith(("lora_", "peft_"))]
        changed = {key: value for key, value in changed.items() if key not in (*adapters, "adapter")}
        block["apply_to"] = "full"
    off = [name for name in TERMS if terms not in ("all", name)]
    return {**changed, "ba_lora": switched_off(block, off) if off else block}


def spell_out(cfg: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Writes into a config, in place, what [`spelled_out`] makes of its `values`, which are returned."""
    changed = spelled_out(values)
    for key in values.keys() - changed.keys():
        del cfg[key]
    for key, value in changed.items():
        if key not in values or value is not values[key]:  # Axolotl's dict merges where it is updated
            cfg[key] = value
    return changed


def of_method(values: dict[str, Any]) -> Iterator[Finding]:
    """Finds a `method` beside what it would write itself or cannot have, and one term alone whose weight is 0."""
    block = values.get("ba_lora")
    if not isinstance(block, dict):
        return
    method, terms = block.get("method"), block.get("terms")
    weight = f"lambda_{terms}"
    if terms in TERMS and not isinstance(block.get(weight), bool) and block.get(weight) == 0:
        yield Finding(
            f"ba_lora.{weight}", block[weight], f"beside terms: {terms} leaves no term", "remove one of the two"
        )
    if method is None:
        return
    if method in ("dora", "full") and block.get("compile"):
        why = f"beside method: {method}, which has another adapter or none"
        yield Finding("ba_lora.compile", block["compile"], why, "remove one of the two")
    if block.get("apply_to") is not None:
        yield Finding("ba_lora.apply_to", block["apply_to"], f"beside method: {method}", "remove one of the two")
    elif values.get("adapter") != ADAPTER:
        adapter = values.get("adapter")
        yield Finding("adapter", str(adapter), f"beside ba_lora.method: {method}", f"write adapter: {ADAPTER}")
