"""What a YAML contradicts, misspells or leaves out: every finding of it, before the model loads."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from typing import Any

from ...adapter.config import DELTA_STARTS
from ...anchors.reading import check_anchors
from ...checkpoint.rules import OPTIONS
from ...config import RegularizerConfig
from ...findings import Finding
from ...settings import settings_of
from ...training.checks.teacher import MUTATING_STARTS
from ...training.task_form import LOSS_TYPES, task_form
from .adapter_keys import of_adapter_keys
from .block import ADAPTER, HOST_KEYS, nearest_field
from .classification import is_classification, of_classification
from .engine import of_engine
from .errors import refuse
from .fsdp import of_fsdp
from .method import of_method, spelled_out
from .model_config import of_model
from .quantisation import of_quantisation
from .refusals import refused

STARTS = (*DELTA_STARTS, True, None)

# names so much ours that at top level they can only be a block forgotten (Axolotl ignores unknown keys)
_OURS = [
    name
    for name in settings_of(RegularizerConfig)
    if name.startswith(("lambda_", "svd_", "teacher_", "diversity_", "share_")) or name == "consistency"
]
# the others, refused there where ba_lora is in use
_BLOCK_ONLY = [*(name for name in settings_of(RegularizerConfig) if name not in _OURS), *HOST_KEYS]

# Axolotl's names of what BaLoraConfig takes by another
_OF_PEFT = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_use_rslora": "use_rslora",
}

# of Axolotl's keys that are read here: blocks of settings, and lists of blocks
_BLOCKS = (
    "bnb_config_kwargs",
    "fsdp_config",
    "gradient_checkpointing_kwargs",
    "model_quantization_config_kwargs",
    "overrides_of_model_kwargs",
)
_LISTS = ("datasets", "test_datasets")


def active(cfg: Any) -> bool:
    """True if this config trains with the terms: `adapter: ba_lora`, or a block with `apply_to`."""
    block = cfg.get("ba_lora")
    return cfg.get("adapter") == ADAPTER or bool(block and block.get("apply_to"))


def of_command_line(arguments: list[str] | None = None) -> Iterator[Finding]:
    """Finds `--ba_lora...` options, which Axolotl's command line drops without a word."""
    for argument in sys.argv[1:] if arguments is None else arguments:
        if argument.startswith("--") and argument[2:].replace("-", "_").startswith(ADAPTER):
            why = "Axolotl drops command-line options of a plug-in's block"
            yield Finding(argument, None, why, "write it in the YAML")


def findings_of(data: dict[str, Any], *, model: bool = True) -> Iterator[Finding]:
    """Finds everything in the whole YAML as it was written that would be ignored, or would train something else.

    Args:
        data: The YAML.
        model: Also what the base model's config says.
    """
    if not isinstance(data.get("adapter") or "", (str, bool)):
        yield Finding("adapter", repr(data["adapter"]), "must be a name", "write adapter: ba_lora")
        return
    yield from of_method(data)
    data = spelled_out(data)
    yield from _names(data)
    written, adapter = data.get("ba_lora"), data.get("adapter")
    block = written if isinstance(written, dict) else {}
    target = block.get("apply_to")
    if adapter != ADAPTER and written is not None:
        expected = {"lora": "lora", "full": None}.get(str(target), ADAPTER)
        if target is None or (adapter or None) != expected:
            also = {"lora": ", or ba_lora.apply_to: lora to put them on it", None: ", or ba_lora.apply_to: full"}
            remedy = f"write adapter: ba_lora{also.get(adapter, '')}"
            remedy += " (of several adapter: lines in a YAML the last counts)"
            yield Finding("adapter", str(adapter), "beside a ba_lora: block would train without its terms", remedy)
            return
    if adapter == ADAPTER and target is not None:
        yield Finding("ba_lora.apply_to", target, "beside adapter: ba_lora contradicts it", "remove one of the two")
    if not active({"adapter": adapter, "ba_lora": block}):
        return
    wrong = {finding.key: finding for finding in _kinds(data)}
    yield from wrong.values()
    data = {key: value for key, value in data.items() if key not in wrong}
    yield from refused(data)
    yield from of_classification(data, block)
    unknown = {finding.key: finding for finding in of_adapter_keys(data)}
    yield from unknown.values()
    data = {key: value for key, value in data.items() if key not in unknown}
    yield from _adapter(data)
    yield from of_quantisation(data, block)
    yield from _terms(data, block)
    yield from of_engine(data, block)
    yield from of_fsdp(data)
    if model:
        yield from of_model(data)


def check_raw(data: dict[str, Any]) -> None:
    """Checks the whole YAML as it was written, but for what the base model's config says.

    Raises:
        SettingError: names every setting that would be ignored, or would train something else.
    """
    refuse(findings_of(data, model=False))


def _terms(data: dict[str, Any], block: dict[str, Any]) -> Iterator[Finding]:
    """What the core refuses once the model is there, said before and in the YAML's words."""
    try:
        asked = block.get("loss_type")  # another one is found with the block's other settings
        task_form(data.get("label_smoothing_factor"), asked if asked in LOSS_TYPES else None)
    except ValueError as error:
        yield Finding.of_error(str(error))
    target = block.get("apply_to")
    cached = block.get("teacher_cache") and not is_classification(data)
    if target == "full" and block.get("lambda_consistency") != 0 and not cached:
        remedy = "ba_lora.teacher_cache: <a directory> (filled before the first step), or 0"
        yield Finding(
            "ba_lora.lambda_consistency",
            block.get("lambda_consistency", "the preset"),
            "has no teacher in full fine-tuning, where no adapter can be switched off",
            f"write {'0' if is_classification(data) else remedy}",
        )
    if block.get("teacher_cache") and data.get("processor_type"):
        yield Finding(
            "ba_lora.teacher_cache",
            block["teacher_cache"],
            f"with processor_type: {data['processor_type']} knows a document by its tokens, the same for every image",
            "remove it",
            False,
        )
    anchors = block.get("anchor_data")
    try:
        check_anchors(
            anchors if isinstance(anchors, str) else None, "the model's own"
        )  # else the block's checks say it
    except ValueError as error:
        yield Finding.of_error(f"ba_lora.{error}")
    start = data.get("peft_init_lora_weights")
    taught = target == "lora" and block.get("lambda_consistency") != 0
    if taught and isinstance(start, str) and start.lower().startswith(MUTATING_STARTS):
        yield Finding(
            "peft_init_lora_weights",
            start,
            "with ba_lora.apply_to: lora rewrites the base, so that the teacher would be its residual",
            "write adapter: ba_lora (the same start, base untouched), or ba_lora.lambda_consistency: 0",
            False,
        )


def _kinds(data: dict[str, Any]) -> Iterator[Finding]:
    """Finds values that are no block or no list where one is read, which no check could look into."""
    plugins = data.get("plugins") or []
    if not isinstance(plugins, (str, list)):
        yield Finding(
            "plugins", repr(plugins), "must be a list of plug-ins", "write plugins: [balora_plugin.BaLoraPlugin]"
        )
    for key in _BLOCKS:
        if not isinstance(data.get(key) or {}, dict):
            yield Finding(key, repr(data[key]), "must be a block of settings, or absent")
    for key in _LISTS:
        if not isinstance(data.get(key) or [], list):
            yield Finding(key, repr(data[key]), "must be a list of datasets")


def _names(data: dict[str, Any]) -> Iterator[Finding]:
    adapter = str(data.get("adapter") or "")
    for key in _BLOCK_ONLY:
        if key in data and (adapter == ADAPTER or "ba_lora" in data):
            yield Finding(key, repr(data[key]), "stands at top level, where it is ignored", f"write ba_lora.{key}")
    if adapter != ADAPTER and adapter.lower().replace("-", "_") in (ADAPTER, "balora"):
        yield Finding("adapter", adapter, "is not an adapter Axolotl or BA-LoRA knows", "did you mean ba_lora?")
    for key in data:
        if key == "ba_lora" or not isinstance(key, str):
            continue
        if difflib.get_close_matches(key.lower().replace("-", "_"), [ADAPTER, "balora"], n=1, cutoff=0.8):
            yield Finding(key, None, "is not a key Axolotl or BA-LoRA knows", "did you mean ba_lora?")
            continue
        near = difflib.get_close_matches(key, _OURS, n=1, cutoff=0.85)
        if near or key.startswith("lambda"):
            remedy = f"write it as ba_lora.{near[0] if near else nearest_field(key)}"
            yield Finding(key, repr(data[key]), "stands at top level, where it is ignored", remedy)


def _adapter(data: dict[str, Any]) -> Iterator[Finding]:
    if data.get("adapter") != ADAPTER:
        return
    if data.get("inference") and not data.get("lora_model_dir") and not data.get("merge_lora"):
        remedy = f"pass --lora-model-dir={data.get('output_dir') or '<output_dir>'}, or write it in the YAML"
        yield Finding("lora_model_dir", None, "is missing, so inference would show the base model", remedy)
    for key in ("lora_r", "lora_alpha"):
        if data.get(key) is None and not data.get("lora_model_dir"):
            yield Finding(key, None, "is missing, adapter: ba_lora needs it", f"write for example {key}: 16")
    yield from _values(data)
    yield from _targets(data)
    start = data.get("peft_init_lora_weights")
    if start not in STARTS:
        remedy = f"write {', '.join(DELTA_STARTS)} or true"
        yield Finding("peft_init_lora_weights", start, "is not a start of BA-LoRA", remedy, True)


def _values(data: dict[str, Any]) -> Iterator[Finding]:
    """Finds values that PEFT would compute or match names with, and cannot."""
    for key, field in _OF_PEFT.items():
        value = data.get(key)
        if value is None or value == []:
            continue
        words, holds = OPTIONS[field]
        if not holds(value):
            shown = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "10**20 or more"
            pattern = isinstance(value, str) and "regular expression" in words  # which then does not compile
            why = "is no regular expression" if pattern else f"must be {words.removesuffix(' or null')}"
            yield Finding(key, shown[:60], why, "write a list of names" if pattern else "")


def _targets(data: dict[str, Any]) -> Iterator[Finding]:
    keys = ("lora_target_linear", "lora_target_modules", "lora_target_parameters")
    if not any(data.get(key) for key in keys) and not data.get("lora_model_dir") and not is_classification(data):
        remedy = "write lora_target_linear: true, or a list of module names"
        yield Finding("lora_target_modules", None, "is missing", remedy)
    modules = data.get("lora_target_modules") or []
    names = [modules] if isinstance(modules, str) else modules
    if not isinstance(names, list):
        return  # which is said already
    for name in names:
        if name in ("lm_head", "embed_tokens", "embed_out", "wte"):
            why = "cannot be adapted (the terms read the head's weight)"
            remedy = "remove it; lora_modules_to_save trains such a module whole"
            yield Finding("lora_target_modules", name, why, remedy, True)
