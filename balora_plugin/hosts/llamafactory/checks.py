"""What a LLaMA-Factory YAML asks of BA-LoRA, found before anything of LLaMA-Factory is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...findings import Finding
from .block import ADAPTER_KEYS, BLOCK, findings_of_block, settings_under_block
from .keys import MAPPED_KEYS, REFUSED_KEYS, REFUSED_VARIABLES, SUPERSEDED_KEYS

_HEADS = ("lm_head", "embed_tokens", "embed_out", "wte")
_QUANTISES = ("hqq", "eetq")  # while it loads, beside bnb
_QUANTISED = ("gptq", "awq", "aqlm", "eetq", "hqq", "quanto", "compressed-tensors")  # mxfp4, fp8: loaded dequantised


class Plan(NamedTuple):
    """A YAML taken apart.

    Attributes:
        arguments: What LLaMA-Factory reads.
        terms: The block's settings of the terms.
        adapter: BaLoraConfig's fields that are not LLaMA-Factory's: the start, compile, start_from.
        said: A sentence for each key that was switched off or mapped.
    """

    arguments: dict[str, Any]
    terms: dict[str, Any]
    adapter: dict[str, Any]
    said: tuple[str, ...]


def planned(data: Mapping[str, Any]) -> Plan:
    """Returns a YAML without findings, taken apart; the YAML itself stays as it is."""
    arguments = {key: value for key, value in data.items() if key != BLOCK}
    block = dict(settings_under_block(data))
    said = []
    for key, instead in SUPERSEDED_KEYS.items():
        if arguments.pop(key, None):
            said.append(f"{key}: switched off, {instead}.")
    start, how = start_of(arguments)
    if how and not goes_on(data):
        said.append(how)
    for key in MAPPED_KEYS:
        arguments.pop(key, None)
    adapter = {"init_lora_weights": start, **{key: block.pop(key) for key in ADAPTER_KEYS if key in block}}
    return Plan(arguments, block, adapter, tuple(said))


def goes_on(data: Mapping[str, Any]) -> bool:
    """Returns whether an adapter that is there goes on training, with the start that it has."""
    return bool(data.get("adapter_name_or_path")) and not data.get("create_new_adapter")


def start_of(data: Mapping[str, Any]) -> tuple[bool | str, str]:
    """Returns the start that `pissa_init` and `pissa_iter` ask for, and a sentence where it is not as they say.

    Without pissa_init it is PiSSA, BA-LoRA's own; `pissa_init: false` is the ordinary LoRA start with the terms.
    """
    wanted, iterations = data.get("pissa_init"), data.get("pissa_iter")
    if wanted is False:
        return True, ""
    if wanted and iterations != -1:
        written = "as by default" if iterations is None else f"pissa_iter: {iterations}"
        return "pissa_fast", f"pissa_init: true ({written}) is the start pissa_fast, which iterates to a tolerance."
    return "pissa", ""


def findings_of_yaml(data: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Finds everything in a YAML, and in the environment, that would not train, or would train something else.

    Args:
        data: The YAML with what the command line says of single keys.
        environment: Of the process; None: its own.
    """
    yield from findings_of_block(data)
    for key, refusal in REFUSED_KEYS.items():
        if key in data and data[key] not in refusal.allowed:
            yield Finding(key, data[key], refusal.why, refusal.remedy, refusal.changes_training)
    yield from _targets(data)
    yield from _quantised(data)
    yield from _start(data)
    variables = os.environ if environment is None else environment
    for name, (why, remedy) in REFUSED_VARIABLES.items():
        if variables.get(name, "0").lower() in ("true", "y", "1"):
            yield Finding(name, variables[name], why, remedy)


def findings_of_base(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Finds a base model that is stored quantised, by its config in a directory or in the cache; the network is not
    asked.
    """
    from transformers import PreTrainedConfig

    name = data.get("model_name_or_path")
    if not isinstance(name, str):
        return
    try:
        config, _ = PreTrainedConfig.get_config_dict(
            name, local_files_only=True, revision=data.get("model_revision"), cache_dir=data.get("cache_dir")
        )
    except (OSError, ValueError):  # LLaMA-Factory says what is wrong with it
        return
    method = str((config.get("quantization_config") or {}).get("quant_method", "")).lower()
    if method in _QUANTISED:
        yield Finding(
            "model_name_or_path",
            name,
            f"is stored in {method}, whose layers BA-LoRA does not adapt",
            "name the full-precision model, with quantization_bit: 4 where memory is short",
            True,
        )


def _targets(data: Mapping[str, Any]) -> Iterator[Finding]:
    targets = data.get("lora_target") or []
    for name in targets.split(",") if isinstance(targets, str) else targets:
        if str(name).strip() in _HEADS:
            why = "cannot be adapted (the terms read the head's weight)"
            remedy = f"remove it; additional_target: {str(name).strip()} trains such a module whole"
            yield Finding("lora_target", str(name).strip(), why, remedy, True)


def _quantised(data: Mapping[str, Any]) -> Iterator[Finding]:
    bits, method = data.get("quantization_bit"), data.get("quantization_method", "bnb")
    if bits is not None and method != "bnb":
        why = "has layers that BA-LoRA does not adapt"
        if method not in _QUANTISES:
            why = "is not known to LLaMA-Factory, which would load the base as it is"
        yield Finding("quantization_method", repr(method), why, "write quantization_method: bnb", True)
    if bits is not None and bits not in (4, 8):
        yield Finding("quantization_bit", bits, "is not a width of bitsandbytes", "write 4 or 8", True)


def _start(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Finds a start that contradicts itself, or that an adapter to go on from brings already."""
    block = settings_under_block(data)
    start = block.get("start_from") if isinstance(block, Mapping) else None
    key = f"{BLOCK}.start_from"
    if start is not None and (not isinstance(start, str) or not start.strip()):
        yield Finding(key, repr(start), "is no path or name of a model", "remove it, or name one")
    if goes_on(data):
        why = "says nothing where adapter_name_or_path goes on training, which has its own start"
        remedy = "remove it, or write create_new_adapter: true"
        if start:
            yield Finding(key, repr(start), why, remedy)
        if data.get("pissa_init") is False:
            yield Finding("pissa_init", False, why, remedy)
        return
    if start and data.get("quantization_bit") is None:
        why = "is for a base that is quantised while it loads"
        yield Finding(key, repr(start), why, "remove it, or write quantization_bit: 4")
    if start and start_of(data)[0] is True:
        yield Finding(key, repr(start), "beside pissa_init: false, which has no A0 and B0", "remove it")
