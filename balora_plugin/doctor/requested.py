"""What of a YAML (Axolotl's, or plain keys of the same names) cannot run on a machine: key, value, remedy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ..findings import Finding
from ..pretrained.attention import FLAGS, attention_of, flash_lacks, half_asked, is_flash, of_flash
from . import versions
from .machine import Machine

PLUGIN = "balora_plugin.BaLoraPlugin"
LIGER_LAYERS = ("rope", "rms_norm", "rms_norm_gated", "layer_norm", "glu_activation", "swiglu")  # behind liger_
NEEDS = {"xformers": ("xformers", "xformers"), "sage": ("sageattention", "sageattention")}  # module, pip's name


def for_axolotl(values: dict[str, Any]) -> bool:
    """Returns whether a YAML is one that Axolotl is to run: plain keys have no base_model."""
    return "base_model" in values


def problems(values: dict[str, Any], machine: Machine) -> list[Finding]:
    """Returns everything in a YAML that cannot run on `machine`.

    Args:
        values: The YAML as it was written.
        machine: The facts to hold it against.
    """
    checks = (_hosts, _attention, _kernels, _precision, _quantisation, _compiling, _engines, _paths)
    found = [problem for check in checks for problem in check(values, machine)]
    if for_axolotl(values) and machine.has("axolotl"):
        found += _of_the_plugin(values, {problem.key for problem in found})
    return found


def _hosts(values: dict[str, Any], machine: Machine) -> Iterator[Finding]:
    if for_axolotl(values) and not machine.has("axolotl"):
        yield Finding(
            "base_model", values["base_model"], "needs Axolotl, which is not installed", versions.remedy("axolotl")
        )
    plugins = values.get("plugins")
    if values.get("adapter") == "ba_lora" and not (isinstance(plugins, (list, str)) and PLUGIN in plugins):
        yield Finding("adapter", "ba_lora", "is this plug-in's, and no line names it", f"write plugins: [{PLUGIN}]")


def _attention(values: dict[str, Any], machine: Machine) -> Iterator[Finding]:
    key, value, name = attention_of(values)
    instead = "write attn_implementation: sdpa"
    for flag in FLAGS if key == "attn_implementation" else ():
        if values.get(flag):
            yield Finding(
                flag, values[flag], f"stands beside {key}: {value}, and Axolotl takes one line alone", "remove it"
            )
    if is_flash(name):
        device = None if machine.device == "cpu" else machine.device
        lacks = flash_lacks(name, device, machine.capability, machine.modules.__contains__)
        yield from of_flash((key, value), lacks, half=half_asked(values))
    elif name in NEEDS and NEEDS[name][0] not in machine.modules:
        package = NEEDS[name][1]
        yield Finding(key, value, f"needs the package {package}", f"pip install {package}, or {instead}")
    elif name == "flex_attention" and machine.device == "cpu":
        yield Finding(key, value, "has no backward pass on a CPU", instead)


def _kernels(values: dict[str, Any], machine: Machine) -> Iterator[Finding]:
    """Finds Liger's layers, which stay Liger's, where there is nothing to run its Triton kernels on."""
    plugins = values.get("plugins")
    listed = plugins if isinstance(plugins, (list, tuple)) else [plugins]
    if machine.device != "cpu" or not any(str(name).endswith("LigerPlugin") for name in listed):
        return
    for key in (f"liger_{layer}" for layer in LIGER_LAYERS):
        if values.get(key):
            yield Finding(key, values[key], "needs a GPU, and there is none here", "remove it", False)


def _precision(values: dict[str, Any], machine: Machine) -> Iterator[Finding]:
    """Finds precisions that are refused: on a CPU bf16 alone is, and fp16 (or bf16: auto) computes in float32 there."""
    without = machine.device == "cpu" and not values.get("use_cpu")
    for key in ("bf16", "bfloat16"):
        if values.get(key) is True and without:
            yield Finding(key, True, "needs a GPU, and there is none here", f"write {key}: false")
        elif values.get(key) is True and machine.device != "cpu" and not machine.bf16:
            yield Finding(key, True, f"is not computed by {machine.name}", f"write {key}: false and fp16: true")
    if values.get("tf32") is True and (machine.capability or (0, 0)) < (8, 0):
        yield Finding("tf32", True, "needs a CUDA device of compute capability 8.0 or more", "write tf32: false")
    if values.get("fp8") and (machine.capability or (0, 0)) < (8, 9):
        yield Finding("fp8", values["fp8"], "needs a CUDA device of compute capability 8.9 or more", "remove it")


def _quantisation(values: dict[str, Any], machine: Machine) -> Iterator[Finding]:
    optimizer = str(values.get("optimizer") or values.get("optim") or "")
    lines: list[tuple[str, Any]] = [(key, True) for key in ("load_in_4bit", "load_in_8bit") if values.get(key) is True]
    if "8bit" in optimizer or "bnb" in optimizer:
        lines.append(("optimizer" if values.get("optimizer") else "optim", optimizer))
    if machine.bitsandbytes is None:
        return
    command = versions.remedy("bitsandbytes")
    for key, value in lines:
        instead = f"write {key}: false" if value is True else f"write {key}: adamw_torch"
        yield Finding(key, value, f"needs bitsandbytes, which {machine.bitsandbytes}", f"{command}, or {instead}")


def _compiling(values: dict[str, Any], machine: Machine) -> Iterator[Finding]:
    block = _block(values)
    how = block.get("compile") or values.get("compile")
    key = "ba_lora.compile" if block.get("compile") else "compile" if how in (True, "layers") else None
    bring = "apt install g++" if machine.device == "cpu" else "pip install triton, apt install gcc"
    if key is not None and machine.compiler is None:
        yield Finding(key, how, "has no compiler here, so it would run eagerly", f"{bring}, or remove it")
    backend = values.get("torch_compile_backend") or ("inductor" if values.get("torch_compile") is True else None)
    padded = not (values.get("sample_packing") or values.get("packing") or values.get("padding_free"))
    if (how is True or backend == "ba_lora") and how != "layers" and is_flash(attention_of(values)[2]) and padded:
        yield Finding(
            key or "torch_compile_backend",
            how or backend,
            "makes no graph of padded batches under flash attention, so it would run eagerly",
            "write sample_packing: true, attn_implementation: sdpa, or ba_lora.compile: layers",
        )
    if backend is None:
        return
    name = "torch_compile_backend" if values.get("torch_compile_backend") else "torch_compile"
    if backend not in machine.backends:
        yield Finding(name, backend, "is no backend here", f"write one of {_some(machine.backends)}")
    elif backend in ("inductor", "ba_lora") and machine.compiler is None:
        yield Finding(name, values[name], "has no compiler here", f"{bring}, or remove it")


def _engines(values: dict[str, Any], machine: Machine) -> Iterator[Finding]:
    value = values.get("deepspeed")
    if value and not machine.has("deepspeed"):
        yield Finding("deepspeed", _brief(value), "needs the package deepspeed", "pip install deepspeed")


def _paths(values: dict[str, Any], machine: Machine) -> Iterator[Finding]:
    """Finds paths that look local and are not there; names on the hub are not looked up."""
    block = _block(values)
    named = [(key, values.get(key)) for key in ("base_model", "lora_model_dir", "resume_from_checkpoint", "deepspeed")]
    named.append(("ba_lora.start_from", block.get("start_from")))
    for key in ("datasets", "test_datasets"):
        entries = values.get(key)
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, dict):
                named.append((f"{key}[{index}].path", entry.get("path")))
    for key, value in named:
        if isinstance(value, str) and looks_local(value) and not os.path.exists(os.path.expanduser(value)):
            yield Finding(key, value, "does not exist", "write a path that does (relative ones count from here)")


def looks_local(name: str) -> bool:
    """Returns whether this can be no name on the hub: a path with a lead, an ending or more than one slash."""
    ends = (".json", ".jsonl", ".yaml", ".yml", ".parquet", ".csv", ".safetensors")
    return name.startswith((".", "/", "~")) or (name.count("/") > 1 and "://" not in name) or name.endswith(ends)


def _of_the_plugin(values: dict[str, Any], known: set[str]) -> list[Finding]:
    """Returns the findings of the plug-in's own checks that are about other keys."""
    from ..hosts.axolotl.plugin import BaLoraPlugin

    return [finding for finding in BaLoraPlugin.findings(values) if finding.key not in known]


def _block(values: dict[str, Any]) -> dict[str, Any]:
    block = values.get("ba_lora")
    return block if isinstance(block, dict) else {}


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(name for name in names if name in ("inductor", "eager", "aot_eager", "cudagraphs"))


def _brief(value: Any) -> Any:
    return value if isinstance(value, str) else "{...}"
