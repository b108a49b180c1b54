"""ms-swift's `init_weights` as BaLoraConfig's `init_lora_weights`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...adapter.config import DELTA_STARTS
from ...adapter.options import OTHER_STARTS
from ...findings import Finding
from .names import VARIABLE

LORA = "lora"  # the ordinary start: ms-swift's own word for it, true, is its default, which means PiSSA here
_ITERATIONS = "pissa_niter_"


def swift_start(init_weights: Any) -> str | bool:
    """Returns `init_lora_weights`: PiSSA for true, which ms-swift has by default, and for what was not written."""
    if init_weights in (None, True, "true", "True"):
        return DELTA_STARTS[0]
    return True if init_weights == LORA else str(init_weights)


def of_start(init_weights: Any) -> Iterator[Finding]:
    """Finds a start that is not one of BA-LoRA's."""
    start = swift_start(init_weights)
    if start is True or start in DELTA_STARTS or str(start).startswith(_ITERATIONS):
        if str(start).startswith(_ITERATIONS) and not str(start).removeprefix(_ITERATIONS).isdigit():
            yield Finding("init_weights", start, "names no number of iterations", f"write {_ITERATIONS}16")
        return
    reason = OTHER_STARTS.get(str(start).lower().replace("-", "_"), "").partition(":")[0]
    why = "is not a start of BA-LoRA" + (f" ({reason})" if reason else "")
    yield Finding("init_weights", init_weights, why, f"write {', '.join(DELTA_STARTS)} or {LORA}", True)


def of_source(values: Mapping[str, Any], block: Mapping[str, Any]) -> Iterator[Finding]:
    """Finds a `start_from` that has nothing to start: no quantised base, or a start without A0 and B0."""
    source, key = block.get("start_from"), f"{VARIABLE}.start_from"
    if not source:
        return
    if swift_start(values.get("init_weights", True)) is True:
        yield Finding(key, repr(source), f"beside init_weights: {LORA}, which has no A0 and B0", "remove it")
    if not (values.get("quant_bits") or values.get("quant_method") or _may_be_stored_quantised(values)):
        why = "is for a quantised base, and this one is not"
        yield Finding(key, repr(source), why, "remove it, or write quant_method: bnb with quant_bits: 4")


def _may_be_stored_quantised(values: Mapping[str, Any]) -> bool:
    """False only where the model's config lies here and says nothing of it; the start looks again at the layers."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(
            values.get("model"), local_files_only=True, revision=values.get("model_revision")
        )
    except (OSError, ValueError, TypeError):
        return True
    return bool(config.get("quantization_config"))
