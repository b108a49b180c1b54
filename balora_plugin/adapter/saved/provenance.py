"""What a saved adapter says about where it comes from: its base's identity, a probe's logits, the teacher.

Taken once a model and kept on the PeftModel (the base never changes): by a trainer before anything is sharded, else at
the first save. Only the adapted logits are taken at every save, where one process can do it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from ...checkpoint.names import PROBE_FILE
from ...config import RegularizerConfig
from ...distributed import is_sharded, process_rank
from ...pretrained import probe
from ...pretrained.identity import BaseIdentity, base_identity, compare, dtype_of, why_not_readable

logger = logging.get_logger(__name__)

_ATTRIBUTE = "_ba_lora_provenance"


@dataclass
class Provenance:
    """What is known of a model's base; `note`: why something is missing; `measured`: what a run has last measured."""

    dtype: str
    identity: BaseIdentity | None = None
    base_logits: Tensor | None = None
    note: str | None = None
    teacher: str | None = None
    measured: dict[str, float] = field(default_factory=dict)


def known(model: PeftModel) -> Provenance | None:
    """Returns what was taken of this model before, in the dtype it has now."""
    found: Provenance | None = model.__dict__.get(_ATTRIBUTE)
    base = model.get_base_model()
    # cast since by its user; FSDP's own casts are no new base
    if found is not None and found.dtype != dtype_of(base) and not is_sharded(base):
        return Provenance(dtype_of(base), teacher=found.teacher, measured=found.measured)
    return found


def take(model: PeftModel, *, collective: bool = False) -> Provenance:
    """Takes identity and base logits of the model's base, unless they were taken before.

    `collective`: every process is here, so that a sharded base can be hashed by all of them together.
    """
    base = model.get_base_model()
    found = known(model) or Provenance(dtype_of(base))
    model.__dict__[_ATTRIBUTE] = found
    if found.identity is not None:
        return found
    found.note = why_not_readable(base)
    if found.note is None or (collective and is_sharded(base)):
        found.identity = base_identity(base)
    if found.note is None:
        found.base_logits, found.note = _attempt(lambda: probe.base_logits(base))
    return found


def prepare(model: PeftModel, teacher: str) -> None:
    """Takes on every process what is known before the model is sharded, and notes the teacher in words.

    Rank 0 alone reads weights that are whole.
    """
    if process_rank() == 0 or is_sharded(model):
        take(model, collective=True)
    else:
        found = known(model) or Provenance(dtype_of(model.get_base_model()))
        model.__dict__[_ATTRIBUTE] = found
    model.__dict__[_ATTRIBUTE].teacher = teacher


def base_sha256(model: Any) -> str | None:
    """Returns the base's fingerprint, where it was taken before."""
    found = known(model) if isinstance(model, PeftModel) else None
    return found.identity.sha256 if found is not None and found.identity is not None else None


def write(directory: str, model: PeftModel, adapter_name: str) -> tuple[dict[str, Any], list[str]]:
    """Writes the probe beside an adapter; returns the keys of ba_lora.json and the names of the files written."""
    found = take(model)
    adapted, note = None, found.note or why_not_readable(model)
    if found.base_logits is not None and note is None:
        adapted, note = _attempt(lambda: probe.adapted_logits(model, adapter_name))
    files = []
    Path(directory, PROBE_FILE).unlink(missing_ok=True)  # of an earlier save
    if found.base_logits is not None:
        vocabulary = probe.vocabulary_of(model.get_base_model())
        assert vocabulary is not None
        probe.write_probe(directory, probe.Probe(vocabulary, found.base_logits, adapted))
        files.append(PROBE_FILE)
    empty: dict[str, Any] = dict.fromkeys(("base_sha256", "base_dtype", "base_quantization", "base_digests"))
    settings = {
        **(empty if found.identity is None else found.identity.to_settings()),
        "base_class": type(model.get_base_model()).__name__,
        "teacher": found.teacher,
        "probe": {"base": found.base_logits is not None, "adapted": adapted is not None, "note": note},
    }
    return settings, files


def _attempt(forward: Callable[[], Tensor | None]) -> tuple[Tensor | None, str | None]:
    """Returns logits, or why there are none: a probe is no reason for a save to fail."""
    try:
        logits = forward()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        note = f"the probe's forward pass failed: {' '.join(str(error).split())[:200]}"
        logger.warning_once(f"BA-LoRA: no probe is stored with the adapter: {note}.")
        return None, note
    return logits, "it is not a causal language model" if logits is None else None


def check_base(
    model: PeftModel, settings: dict[str, Any], model_id: str, read_probe: Callable[[], probe.Probe | None]
) -> None:
    """Refuses to train an adapter further on another base than the one it was trained on.

    Digests decide where they can. Where they cannot (a quantised base beside another form of it, float16, another
    config) the stored probe does. Allowed with a warning: the same base in another dtype, or quantised otherwise. Bases
    that are quantised alike and hold other bytes are two, unless the probe says that they compute the same.

    Raises:
        ValueError: another base; names both.
    """
    recorded = BaseIdentity.from_settings(settings)
    if recorded is None:
        return
    found = take(model)
    here = found.identity
    verdict = compare(recorded, here)
    if here is None or verdict in ("same", "unknown"):
        return
    name = getattr(model.config, "_name_or_path", "") or "a model without a name"
    both = f"trained on {settings.get('base_model') or 'a model without a name'}, {recorded}; here {name}, {here}"
    if verdict == "dtype":
        logger.warning_once(f"BA-LoRA: the adapter in {model_id!r} is loaded onto its base in another dtype ({both}).")
        return
    distance = None
    stored = read_probe()
    if stored is not None and stored.base is not None and found.base_logits is not None:
        distance = probe.discrepancy(found.base_logits, stored.base)
    quantised = recorded.quantization != here.quantization
    near = distance is None or distance <= probe.tolerance(recorded.dtype, here.dtype, quantised=quantised)
    measured = "logits could not be compared" if distance is None else f"logits {distance:.2g} apart"
    # quantised alike, the same weights have the same bytes: with no logits to say otherwise it is another model
    alike = recorded.quantization is not None and not quantised and recorded.dtypes == here.dtypes
    if verdict == "other" or (verdict == "unclear" and (not near or (distance is None and alike))):
        raise ValueError(
            f"the adapter in {model_id!r} belongs to another base ({both}; {measured}): load it onto its own. To go "
            "on from what it computes, merge it into its base first (balora export --merge)."
        )
    if verdict == "config" and near and distance is not None:
        return  # another release of transformers writes other keys
    what = "the same weights under another config" if verdict == "config" else "another form of its base"
    logger.warning_once(f"BA-LoRA: the adapter in {model_id!r} is loaded onto {what} ({both}; {measured}).")


def teacher_in_words(config: RegularizerConfig, teacher_model: nn.Module | None) -> str:
    """Returns what the teacher is, in words, for the adapter's file and its model card."""
    if not config.lambda_consistency:
        return "none: lambda_consistency is 0"
    if teacher_model is not None:
        name = getattr(getattr(teacher_model, "config", None), "_name_or_path", "") or type(teacher_model).__name__
        return f"a second model, {name}"
    if config.task == "nlu":
        after = f" after {config.head_warmup_steps} steps of the head alone" if config.head_warmup_steps else ""
        return f"the base itself, adapter switched off, with the head that the run began with{after}"
    if config.teacher_cache is not None:
        return "the base itself, adapter switched off, its outputs kept in a teacher_cache"
    return "the base itself, adapter switched off"
