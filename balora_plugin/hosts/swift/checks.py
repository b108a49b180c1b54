"""What `swift sft` would train otherwise than it says: found in its arguments as plain values, before it loads."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from ...anchors.reading import check_anchors
from ...checkpoint.location import AdapterFiles
from ...checkpoint.settings import read_settings
from ...findings import Finding
from ...training.task_form import task_form
from .block import of_settings, read_block
from .keys import NOT_ONE, REFUSED
from .names import TASKS, TUNER, VARIABLE
from .starts import of_source, of_start

Arguments = Mapping[str, Any]
_HEADS = ("lm_head", "embed_tokens", "embed_out", "wte", "all-embedding")
_HEAD_PATHS = (
    "lm_head",
    "embed_out",
    "model.embed_tokens",
    "model.language_model.embed_tokens",
    "gpt_neox.embed_in",
    "transformer.wte",
)
_DERIVED = {
    "optimizer: lorap": "lorap_lr_ratio",
    "optimizer: galore": "use_galore",
}  # what ms-swift sets by another key
_UNREAD_BY_DEFAULT = {"lora_rank": 8, "lora_alpha": 32.0}  # ms-swift's own: what was not written


def findings_of_run(values: Arguments, text: str | None) -> Iterator[Finding]:
    """Finds everything in the arguments, and in BA_LORA as its text, which may be no mapping at all."""
    try:
        block = read_block(text)
    except ValueError as error:
        block = {}
        if values.get("tuner_type", "lora") == TUNER:
            yield Finding.of_error(str(error))
    yield from findings_in(values, block)


def findings_in(values: Arguments, block: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Finds everything in the arguments that would be ignored, or would train something else.

    Args:
        values: ms-swift's arguments by name; what is left out has its default.
        block: What BA_LORA says; None where it is not set.
    """
    if values.get("tuner_type", "lora") != TUNER:
        yield from of_other_tuner(values, block)
        return
    task = values.get("task_type") or TASKS[0]
    if values.get("rlhf_type"):
        why = "trains with another loss: BA-LoRA is for supervised fine-tuning"
        yield Finding("rlhf_type", values["rlhf_type"], why, "use swift sft, or tuner_type: lora", True)
        return
    if task not in TASKS:
        why = "is not trained by BA-LoRA, whose terms are for language models and classifiers"
        yield Finding("task_type", task, why, f"write {' or '.join(TASKS)}, or tuner_type: lora", True)
    yield from _refused(values)
    yield from of_start(values.get("init_weights", True))
    yield from of_source(values, block or {})
    yield from _adapter(values)
    yield from _together(values, task)
    yield from of_settings(block or {}, "nlu" if task == "seq_cls" else "nlg")
    yield from _terms(values, block or {})
    yield from _continued(values)


def of_other_tuner(values: Arguments, block: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Finds what would train without terms: those beside another tuner, and a tuner that ms-swift took from a file."""
    tuner = values.get("tuner_type", "lora")
    directory = _loaded_from(values)
    if directory and (block is not None or _asked_for() or _of_our_adapter(values)):
        path = os.path.join(directory, "args.json")
        why = f"takes tuner_type: {tuner} from {path}, and would train without the terms"
        yield Finding("load_args", True, why, "remove it")
    elif block is not None:
        why = f"beside {VARIABLE} would train without its terms"
        yield Finding("tuner_type", tuner, why, f"write tuner_type: {TUNER}, or unset {VARIABLE}")


def _loaded_from(values: Arguments) -> str:
    """Returns the directory whose args.json ms-swift has read the tuner from, an adapter before a model; or nothing."""
    places = (_adapter_path(values), str(values.get("model") or "")) if values.get("load_args") else ()
    return next((path for path in places if path and os.path.isfile(os.path.join(path, "args.json"))), "")


def _asked_for() -> bool:
    """Returns whether the command line, which ms-swift makes of a YAML too, says tuner_type: ba_lora."""
    return f"--tuner_type={TUNER}" in sys.argv or ("--tuner_type", TUNER) in zip(sys.argv, sys.argv[1:], strict=False)


def _of_our_adapter(values: Arguments) -> bool:
    path = _adapter_path(values)
    settings = read_settings(AdapterFiles(path)) if os.path.isdir(path) else None
    return settings is not None and bool(settings["delta_form"])


def _refused(values: Arguments) -> Iterator[Finding]:
    for key, (why, remedy, changes, refused) in REFUSED.items():
        value = values.get(key)
        if values.get(_DERIVED.get(f"{key}: {value}", "")):
            continue
        if (value in refused if refused else value not in (None, False, 0, "", [], {})) and not (
            key in NOT_ONE and str(value) == "1"
        ):
            yield Finding(key, value, why, remedy, changes)


def _adapter(values: Arguments) -> Iterator[Finding]:
    for key in ("lora_rank", "lora_alpha"):
        value = values.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 or value != int(value):
            yield Finding(key, repr(value), "must be a whole number of at least 1, for example 16")
    pattern = values.get("target_regex")
    targets = [] if pattern else values.get("target_modules") or []  # ms-swift puts the one in the other's place
    for name in [targets] if isinstance(targets, str) else targets:
        if name in _HEADS:
            why = "cannot be adapted (the terms read the head's weight)"
            remedy = f"remove it; modules_to_save: [{name}] trains such a module whole"
            yield Finding("target_modules", name, why, remedy, True)
    yield from _pattern(pattern)


def _pattern(pattern: Any) -> Iterator[Finding]:
    """Finds a `target_regex` that matches a head or embeddings, by the paths that they have in most models."""
    if not pattern:
        return
    try:
        matched = [path for path in _HEAD_PATHS if re.fullmatch(str(pattern), path)]
    except re.error as error:
        yield Finding("target_regex", repr(pattern), f"is no regular expression ({error})", "correct it")
        return
    if matched:
        why = f"matches {matched[0]}, which cannot be adapted (the terms read the head's weight)"
        yield Finding("target_regex", repr(pattern), why, "write one that leaves head and embeddings out", True)


def _together(values: Arguments, task: str) -> Iterator[Finding]:
    """Finds what does not go together, or goes together in one kind of task alone."""
    if task == "seq_cls":
        for key in ("packing", "padding_free"):
            if values.get(key):
                yield Finding(key, values[key], "does not work with task_type: seq_cls", "remove it", False)
    for callback in values.get("callbacks") or []:
        if callback in ("lisa", "adalora"):
            yield Finding("callbacks", callback, "is for another tuner", "remove it", True)
    try:
        task_form(values.get("label_smoothing_factor"), None)
    except ValueError as error:
        yield Finding.of_error(str(error))


def _terms(values: Arguments, block: Mapping[str, Any]) -> Iterator[Finding]:
    try:
        check_anchors(block.get("anchor_data"), "the model's own")
    except ValueError as error:
        yield Finding.of_error(f"{VARIABLE}.{error}")
    if block.get("teacher_cache") and values.get("streaming"):
        why = "needs all documents before the first step"
        yield Finding(
            f"{VARIABLE}.teacher_cache",
            block["teacher_cache"],
            f"{why}, and streaming: true has none",
            "remove one of the two",
        )


def _continued(values: Arguments) -> Iterator[Finding]:
    """Finds a rank or an alpha that contradicts the adapter to go on from, which has its own."""
    key = "resume_from_checkpoint" if values.get("resume_from_checkpoint") else "adapters"
    path = _adapter_path(values)
    if not os.path.isdir(path):
        return
    try:
        settings = read_settings(AdapterFiles(path))
    except ValueError as error:  # a damaged file, or another release's
        yield Finding(key, None, str(error).removesuffix("."))
        return
    if settings is None or not settings["delta_form"]:
        why = "is no BA-LoRA adapter, which tuner_type: ba_lora goes on from"
        yield Finding(key, path, why, "write tuner_type: lora, or name a checkpoint of a BA-LoRA run")
        return
    for name, ours in (("lora_rank", "r"), ("lora_alpha", "lora_alpha")):
        asked, there = values.get(name), settings["config"].get(ours)
        if asked not in (None, _UNREAD_BY_DEFAULT[name]) and there is not None and asked != there:
            yield Finding(
                name, asked, f"contradicts the adapter in {path}, which has {there}", f"write {name}: {there}"
            )


def _adapter_path(values: Arguments) -> str:
    """Returns the adapter to go on from; empty where there is none."""
    adapters = values.get("adapters") or []
    first = adapters if isinstance(adapters, str) else next(iter(adapters), "")
    return str(values.get("resume_from_checkpoint") or first)
