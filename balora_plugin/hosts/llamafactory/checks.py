"""What a LLaMA-Factory YAML asks of BA-LoRA, found before anything of LLaMA-Factory is imported."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...config import RegularizerConfig
from ...findings import Finding
from ...settings import settings_of
from .keys import MAPPED_KEYS, REFUSED_KEYS, REFUSED_VARIABLES, SUPERSEDED_KEYS

BLOCK = "ba_lora"
ADAPTER_KEYS = ("compile", "start_from")  # of the block, beside the terms
_TERMS = tuple(settings_of(RegularizerConfig))
_QUANTISED = ("gptq", "awq", "aqlm", "eetq", "hqq", "fp8", "mxfp4", "quanto", "compressed-tensors")


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
    block = dict(data.get(BLOCK) or {})
    said = []
    for key, instead in SUPERSEDED_KEYS.items():
        if arguments.pop(key, None):
            said.append(f"{key}: switched off, {instead}.")
    start, how = start_of(arguments)
    if how:
        said.append(how)
    for key in MAPPED_KEYS:
        arguments.pop(key, None)
    adapter = {"init_lora_weights": start, **{key: block.pop(key) for key in ADAPTER_KEYS if key in block}}
    return Plan(arguments, block, adapter, tuple(said))


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
    yield from _block(data)
    for key, refusal in REFUSED_KEYS.items():
        if key in data and data[key] not in refusal.allowed:
            yield Finding(key, data[key], refusal.why, refusal.remedy, refusal.changes_training)
    yield from _quantised(data)
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


def _block(data: Mapping[str, Any]) -> Iterator[Finding]:
    if BLOCK not in data:
        near = difflib.get_close_matches(BLOCK, [str(key) for key in data], n=1, cutoff=0.7)
        if near:
            yield Finding(near[0], None, "is not a key LLaMA-Factory or BA-LoRA knows", "did you mean ba_lora?")
        else:
            remedy = "write it (ba_lora: {lambda_consistency: 0.3}), or train by llamafactory-cli"
            yield Finding(BLOCK, None, "is missing, the block with the terms", remedy)
    for key in (*_TERMS, *ADAPTER_KEYS):
        if key in data:
            yield Finding(key, data[key], "stands at top level, where nobody reads it", f"write {BLOCK}.{key}")
    block = data.get(BLOCK) or {}
    if not isinstance(block, Mapping):
        yield Finding(BLOCK, repr(block), "must be a block of settings", "write ba_lora: {lambda_consistency: 0.3}")
        return
    terms = {key: value for key, value in block.items() if key not in ADAPTER_KEYS}
    if block.get("task") == "nlu":
        why = "asks for the terms of classifiers, which LLaMA-Factory does not train"
        yield Finding(f"{BLOCK}.task", "nlu", why, "remove it")
        return
    unknown = [{key: terms.pop(key)} for key in list(terms) if key not in _TERMS]
    for part in (*unknown, terms):
        try:
            RegularizerConfig.from_dict(part).resolved("nlg")
        except (ValueError, TypeError) as error:
            yield Finding.of_error(f"{BLOCK}.{error}")
    compiled = block.get("compile", False)
    if not isinstance(compiled, bool) and compiled != "layers":
        yield Finding(f"{BLOCK}.compile", repr(compiled), "is not known", "write true, false or layers")


def _quantised(data: Mapping[str, Any]) -> Iterator[Finding]:
    bits, method = data.get("quantization_bit"), str(data.get("quantization_method") or "bnb").lower()
    if bits is not None and method not in ("bnb", "bitsandbytes"):
        yield Finding(
            "quantization_method",
            method,
            "has layers that BA-LoRA does not adapt",
            "write quantization_method: bnb",
            True,
        )
    if bits is not None and bits not in (4, 8):
        yield Finding("quantization_bit", bits, "is not a width of bitsandbytes", "write 4 or 8", True)
    block = data.get(BLOCK)
    start = block.get("start_from") if isinstance(block, Mapping) else None
    if start and bits is None:
        why = "is for a base that is quantised while it loads"
        yield Finding(f"{BLOCK}.start_from", repr(start), why, "remove it, or write quantization_bit: 4")
    if start and start_of(data)[0] is True:
        yield Finding(
            f"{BLOCK}.start_from", repr(start), "beside pissa_init: false, which has no A0 and B0", "remove it"
        )
