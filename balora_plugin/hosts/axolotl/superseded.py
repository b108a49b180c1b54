"""What changes speed or memory alone and cannot stay: switched off, with what takes its place.

docs/design/hosts.md lists every such key; a test holds that table against this one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...findings import Finding

logger = logging.getLogger("axolotl.balora_plugin")

_LOSS = "the loss here never makes full logits either"
_LAYERS = "the adapter's own layers, which know its frozen factors and the teacher's pass"
_SEPARATE = "linear layers one by one, which an adapter needs"
_EXPERTS = "experts_implementation: grouped_mm, which reads adapted experts through their layer"
# key -> what takes its place; a truthy value is switched off
SUPERSEDED: dict[str, str] = {
    "cut_cross_entropy": _LOSS,
    "chunked_cross_entropy": _LOSS,
    "liger_fused_linear_cross_entropy": _LOSS,
    "liger_cross_entropy": _LOSS,
    "flash_attn_cross_entropy": _LOSS,
    "lora_mlp_kernel": _LAYERS,
    "lora_qkv_kernel": _LAYERS,
    "lora_o_kernel": _LAYERS,
    "lora_embedding_kernel": _LAYERS,
    "dsv4_fp8_lora_kernel": _LAYERS,
    "dsv4_shared_mlp_lora_kernel": _LAYERS,
    "flash_attn_fuse_mlp": _SEPARATE,
}
# Axolotl turns them on by itself where they are not set, for adapter: lora
DEFAULTS_ON = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
CUT_CROSS_ENTROPY = "CutCrossEntropyPlugin"  # which sets cut_cross_entropy where the YAML does not

EXPERT_KERNELS = ("scattermoe", "sonicmoe")
# the keys that choose kernels for experts; those that read lora_A and lora_B go where experts are adapted
CHOOSING_EXPERTS = ("expert_backend", "experts_implementation", "use_scattermoe", "use_sonicmoe")
_EXPERT_LINEARS = {"w1", "w2", "w3"}  # target_modules that PEFT makes parameters of fused experts


class SwitchedOff(NamedTuple):
    """A key that was asked for, its value, and what takes its place."""

    key: str
    value: Any
    instead: str


def expert_kernels(values: Any) -> list[tuple[str, Any]]:
    """Returns the lines of a YAML that choose kernels for experts which read lora_A and lora_B."""
    lines = [(key, values.get(key)) for key in CHOOSING_EXPERTS]
    return [
        (key, value)
        for key, value in lines
        if value is True or (value and any(name in str(value) for name in EXPERT_KERNELS))
    ]


def asked(values: Any) -> Iterator[SwitchedOff]:
    """Finds what of a YAML, written or validated, [`switch_off`] turns off."""
    for key, instead in SUPERSEDED.items():
        if values.get(key):
            yield SwitchedOff(key, values.get(key), instead)
    if _asks_for_cut_cross_entropy(values) and values.get("cut_cross_entropy") is None:
        yield SwitchedOff(f"plugins: {CUT_CROSS_ENTROPY}", None, _LOSS)
    if _adapts_experts(values):
        for key, value in expert_kernels(values):
            yield SwitchedOff(key, value, _EXPERTS)


def switch_off(cfg: Any) -> None:
    """Before validation: turns off what BA-LoRA's own layers and loss supersede, and says so in one line."""
    off = list(asked(cfg))
    for key in (*SUPERSEDED, *DEFAULTS_ON):
        if cfg.get(key) or (key in DEFAULTS_ON and cfg.get(key) is None):
            cfg[key] = False
    if _asks_for_cut_cross_entropy(cfg):
        cfg["cut_cross_entropy"] = False
    if any(found.key in CHOOSING_EXPERTS for found in off):
        for key in CHOOSING_EXPERTS:
            cfg[key] = {"expert_backend": None, "experts_implementation": "grouped_mm"}.get(key, False)
    if off:
        logger.warning("BA-LoRA switches off what another part does here, and trains the same: %s", _in_words(off))


def _in_words(off: list[SwitchedOff]) -> str:
    """Returns the keys by what takes their place: `a, b (the reason); c (another)`."""
    by_instead: dict[str, list[str]] = {}
    for key, _, instead in off:
        by_instead.setdefault(instead, []).append(key)
    return "; ".join(f"{', '.join(keys)} ({instead})" for instead, keys in by_instead.items())


def still_on(cfg: Any) -> Iterator[Finding]:
    """Finds in the final config what another plug-in's defaults or Axolotl's validation switched on again."""
    for key, value, instead in asked(cfg):
        yield Finding(
            key,
            value,
            f"was switched on after the YAML was read, and in its place here is {instead}",
            f"write {key}: false",
            False,
        )


def _asks_for_cut_cross_entropy(values: Any) -> bool:
    return any(str(name).rpartition(".")[2] == CUT_CROSS_ENTROPY for name in values.get("plugins") or [])


def _adapts_experts(values: Any) -> bool:
    modules = values.get("lora_target_modules") or []
    named = {modules} if isinstance(modules, str) else set(modules)
    return bool(values.get("lora_target_parameters") or named & _EXPERT_LINEARS)
