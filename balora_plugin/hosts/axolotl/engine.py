"""How a YAML lets the model run: compilation, checkpointing, attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...findings import Finding
from ...pretrained.attention import (
    FLAGS,
    accelerator,
    attention_of,
    check_flash,
    half_asked,
    is_flash,
    lacks_here,
    of_flash,
)
from ...training.compiling import BACKEND, LAYERS


def of_engine(data: dict[str, Any], block: dict[str, Any]) -> Iterator[Finding]:
    """Finds contradictions in how the model is to run; `block`: the YAML's `ba_lora:`."""
    ours = data.get("torch_compile_backend") == BACKEND  # the same, said twice
    if block.get("compile") and data.get("torch_compile") and not ours:
        yield Finding(
            "torch_compile",
            data["torch_compile"],
            f"beside ba_lora.compile: {str(block['compile']).lower()} would compile the model twice",
            f"remove one of the two, or write torch_compile_backend: {BACKEND}",
            False,
        )
    if compiles_whole(data) and data.get("gradient_checkpointing") and reentrant_of(data):
        said = "ba_lora.compile: true" if block.get("compile") else f"torch_compile_backend: {BACKEND}"
        yield Finding(
            "gradient_checkpointing_kwargs",
            dict(data["gradient_checkpointing_kwargs"]),
            f"with {said}, whose graphs cannot hold reentrant checkpointing",
            "write use_reentrant: false (or leave the line out), or ba_lora.compile: layers",
            False,
        )
    for flag in FLAGS if data.get("attn_implementation") else ():
        if data.get(flag):
            why = f"beside attn_implementation: {data['attn_implementation']}: Axolotl takes one line alone"
            yield Finding(flag, data[flag], why, f"remove {flag}", False)
    key, value, name = attention_of(data)
    if is_flash(name):
        yield from of_flash((key, value), None, half=half_asked(data))


def compiles_whole(data: Any) -> bool:
    """Whether a YAML asks for the backend's graphs of the whole model, in the block or by Axolotl's own keys."""
    block = data.get("ba_lora")
    how = block.get("compile") if isinstance(block, dict) else None
    named = bool(data.get("torch_compile")) and data.get("torch_compile_backend") == BACKEND
    return how is True or (named and how != LAYERS)


def reentrant_of(data: Any) -> bool:
    """Whether the YAML says use_reentrant: true."""
    return bool((data.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"))


def attention_setting(data: Any) -> str:
    """The line of a YAML, written or validated, that names the attention implementation; empty without one."""
    key, value, _ = attention_of(data)
    return f"{key}: {str(value).lower() if value is True else value}" if key else ""


def flash_at_once(data: Any, *, refused: bool) -> Iterator[Finding]:
    """Finds what this machine lacks for flash attention where a YAML, as it was written, is refused anyway.

    So that nothing is left for another round: by us (`refused`), or for bf16 by Axolotl's validation, which follows. A
    YAML with nothing else is only refused when its model is to load: data may be prepared on another machine.
    """
    key, value, name = attention_of(data)
    if not is_flash(name) or any(data.get(elsewhere) for elsewhere in ("is_preprocess", "merge_lora", "use_ray")):
        return
    full = [key for key in ("bf16", "bfloat16") if data.get(key) is True] if accelerator() is None else []
    lacks = lacks_here(name) if refused or full else None
    if lacks is not None:
        yield from of_flash((key, value), lacks, half=half_asked(data))
        for precision in full:
            yield Finding(precision, True, "needs a GPU, and there is none here", f"write {precision}: false")


def attention_here(cfg: Any, setting: str) -> Iterator[Finding]:
    """Finds flash attention in the final config that this machine or the precision cannot run.

    `setting`: the line of the YAML that names it.
    """
    name = attention_of(cfg)[2]
    if not is_flash(name):
        return
    try:
        check_flash(name, setting, "attn_implementation: sdpa")
    except ValueError as error:
        yield Finding.of_error(str(error))
    if cfg.get("torch_dtype") == torch.float32:
        key, _, value = setting.partition(": ")
        yield from of_flash((key, value), None, half=False)
