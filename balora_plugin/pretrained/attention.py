"""Attention kernels: what flash attention needs, said before training; one kernel for teacher and student."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch

from ..findings import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@runtime_checkable
class RunArguments(Protocol):
    """What is read of TrainingArguments here: where a run computes, and in what."""

    @property
    def device(self) -> torch.device: ...
    @property
    def bf16(self) -> bool: ...
    @property
    def fp16(self) -> bool: ...


ACCELERATORS = ("cuda", "xpu", "npu", "mlu", "musa")  # where transformers runs flash attention
HALF = (torch.float16, torch.bfloat16)


class FlashPackage(NamedTuple):
    """Where an implementation comes from: module, pip's name, and the least CUDA compute capability (major)."""

    module: str
    pip: str
    capability: int


FLASH = {
    "flash_attention_2": FlashPackage("flash_attn.flash_attn_interface", "flash-attn", 8),
    "flash_attention_3": FlashPackage("flash_attn_interface", "flash-attn-3", 8),
    "flash_attention_4": FlashPackage("flash_attn.cute", "flash-attn-4", 9),
}


def is_flash(name: Any) -> bool:
    """Returns whether this is a flash implementation of transformers, kernels from the hub included.

    They compute in half precision alone.
    """
    return str(name or "").startswith("flash_attention") or "flash-attn" in str(name or "")


def importable(module: str) -> bool:
    """Returns whether a (dotted) module is installed; it is not imported, its parents are."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def accelerator() -> str | None:
    """Returns the type of this machine's accelerator, None without one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else found.type


def flash_lacks(
    name: str, device: str | None, capability: tuple[int, int] | None, has: Callable[[str], bool]
) -> tuple[str, str] | None:
    """Returns what the flash implementation `name` lacks on a machine and the command that helps; None: nothing.

    Args:
        name: An attn_implementation that `is_flash`.
        device: The type of its accelerator, None without one.
        capability: CUDA's, (major, minor).
        has: Whether a module is installed. Without its package transformers takes a build from the hub, by the package
            `kernels`: where that is installed, nothing is missing.
    """
    package = FLASH.get(name)
    if device not in ACCELERATORS:
        return "needs a GPU, and there is none here", ""
    if "/" in name and not has("kernels"):
        return "is a kernel from the hub, which needs the package kernels", "pip install kernels"
    if package is None or device != "cuda" or capability is None:
        return None
    if capability[0] < package.capability:
        needs = f"needs compute capability {package.capability}.0 or more"
        return f"{needs}, and this GPU has {capability[0]}.{capability[1]}", ""
    if not has(package.module) and not has("kernels"):
        build = " --no-build-isolation" if name == "flash_attention_2" else ""
        return f"needs the package {package.pip}, which is not installed", f"pip install {package.pip}{build}"
    return None


def lacks_here(name: str) -> tuple[str, str] | None:
    """Returns what [`flash_lacks`] says of this machine."""
    device = accelerator()
    return flash_lacks(name, device, torch.cuda.get_device_capability() if device == "cuda" else None, importable)


def of_flash(line: tuple[str, Any], lacks: tuple[str, str] | None, *, half: bool) -> Iterator[Finding]:
    """Finds what is to be written where flash attention cannot run: machine and precision at once.

    Args:
        line: Key and value of the YAML's line about attention.
        lacks: What [`flash_lacks`] says.
        half: Whether the run computes in half precision.
    """
    key, value = line
    instead = "write attn_implementation: sdpa" + (" in its place" if key != "attn_implementation" else "")
    why, command = lacks or ("", "")
    if lacks is not None and not command:  # nothing brings it here
        yield Finding(key, value, why, instead)
    elif lacks is not None:
        both = "" if half else ", and half precision"
        yield Finding(key, value, f"{why}{both}", f"{command}{'' if half else ' and write bf16: true'}, or {instead}")
    elif not half:
        yield Finding(key, value, "needs half precision", f"write bf16: true, or {instead.partition(' ')[2]}", False)


def half_asked(values: Any) -> bool:
    """Returns whether a YAML's lines ask for half precision, where Axolotl takes bf16: auto if none says."""
    return values.get("bf16", "auto") not in (False, None, "false") or bool(
        values.get("fp16") or values.get("bfloat16") or values.get("float16")
    )


def check_flash(name: Any, setting: str, instead: str) -> None:
    """Refuses a flash implementation that this machine cannot run; other names pass.

    Args:
        name: An attn_implementation, or None.
        setting: Key and value as the user wrote them.
        instead: What to write in their place.

    Raises:
        ValueError: `setting`, what is missing, the remedy.
    """
    if not is_flash(name):
        return
    lacks = lacks_here(str(name))
    if lacks is not None:
        why, command = lacks
        raise ValueError(f"{setting} {why}: {command and command + ', or '}write {instead}.")


def implementation_of(model: Any) -> str:
    """Returns the attention implementation of a transformers model (inside PEFT too); empty if it has none."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "")


def check_attention(model: PreTrainedModel, args: RunArguments) -> None:
    """Refuses flash attention on a device or in a precision that it cannot run in; called before any SVD.

    Args:
        model: The causal language model or classifier, perhaps inside PEFT.
        args: Its TrainingArguments.

    Raises:
        ValueError: names attn_implementation, what it needs and what to write.
    """
    name = implementation_of(model)
    if not is_flash(name):
        return
    setting, instead = f"attn_implementation={name!r}", "attn_implementation='sdpa' where the model is loaded"
    if args.device.type == "cpu":
        raise ValueError(f"{setting} needs a GPU, and this run is on the CPU: write {instead}.")
    check_flash(name, setting, instead)
    mixed = args.bf16 or args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION") in ("bf16", "fp16")
    if not mixed and precision_of(model) not in HALF:
        dtype = str(precision_of(model)).removeprefix("torch.")
        raise ValueError(
            f"{setting} computes in half precision alone, and this model is in {dtype} without autocast: set bf16=True "
            f"(or fp16=True), load the model with dtype=torch.bfloat16, or write {instead}."
        )


def precision_of(model: PreTrainedModel) -> torch.dtype:
    """Returns what the model's attention computes in without autocast; of a quantised one as its config says."""
    config = model.config
    quantised = getattr(config, "quantization_config", None) is not None
    return config.dtype if quantised and isinstance(config.dtype, torch.dtype) else model.dtype


def check_same_attention(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuses a second model as teacher that attends by another kernel: its rounding would count as distance.

    Raises:
        ValueError: names both implementations and what to call.
    """
    ours, theirs = implementation_of(model), implementation_of(teacher)
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"teacher_model attends by {theirs!r}, the model by {ours!r}: call "
            f"teacher_model.set_attn_implementation({ours!r}), or load it with attn_implementation={ours!r}."
        )


FLAGS = {  # Axolotl's older keys -> attn_implementation
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}


def attention_of(values: Any) -> tuple[str, Any, str]:
    """Returns key and value of the line about attention, and the implementation it asks for.

    Without such a line: ("", None, "sdpa").
    """
    for key in ("attn_implementation", *FLAGS):
        if values.get(key):
            return key, values[key], str(values[key]) if key == "attn_implementation" else FLAGS[key]
    return "", None, "sdpa"
