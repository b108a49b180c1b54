"""What would train something else than the YAML says, refused before the model loads: key, value, remedy."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from typing import Any

import click

from ...config import RegularizerConfig

ADAPTER = "ba_lora"


class SettingError(click.ClickException, ValueError):
    """A wrong setting: a ValueError for code, one line without a traceback on Axolotl's command line.

    Axolotl's own launchers (accelerate, torchrun) run it outside click, where an uncaught one reaches the interpreter:
    there too it is one line, from the first process of a machine.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = _one_line_for_settings


def _one_line_for_settings(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, SettingError):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"Error: {error}", file=sys.stderr)


STARTS = ("pissa", "pissa_fast", True, None)

# names so much ours that at top level they can only be a block forgotten (Axolotl ignores unknown keys)
_OURS = [
    field.name
    for field in dataclasses.fields(RegularizerConfig)
    if field.name.startswith(("lambda_", "svd_", "teacher_", "diversity_", "share_")) or field.name == "consistency"
]

_KERNELS = "reads lora_A and lora_B itself and would leave out the frozen factors: set it to false."
_LOGITS = "replaces the loss or the forward that computes the terms: remove it (our own loss never holds the logits)."
# key -> why; a truthy value is refused
_REFUSED: dict[str, str] = {
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "lora_embedding_kernel": _KERNELS,
    "liger_fused_linear_cross_entropy": _LOGITS,
    "liger_cross_entropy": _LOGITS,
    "cut_cross_entropy": _LOGITS,
    "chunked_cross_entropy": _LOGITS,
    "use_eaft": _LOGITS,
    "kd_trainer": _LOGITS,
    "orpo_alpha": _LOGITS,
    "load_in_4bit": "is not supported with adapter: ba_lora yet: remove it, or use adapter: qlora without the terms.",
    "load_in_8bit": "is not supported with adapter: ba_lora yet: remove it, or use adapter: lora without the terms.",
    "gptq": "is not supported with adapter: ba_lora: use the full-precision base model.",
    "rl": "trains with another loss: BA-LoRA is for supervised fine-tuning; remove it.",
    "reward_model": "trains with another loss: BA-LoRA is for supervised fine-tuning; remove it.",
    "process_reward_model": "trains with another loss: BA-LoRA is for supervised fine-tuning; remove it.",
    "relora": "restarts the adapter into the base, which BA-LoRA never changes: remove it.",
    "peft_use_dora": "is another adapter: remove it.",
    "peft_layer_replication": "changes the base model that the teacher shares: remove it.",
    "peft_trainable_token_indices": "trains base parameters that the teacher shares: remove it.",
    "unfrozen_parameters": "trains base parameters that the teacher shares: remove it.",
    "sequence_parallel_degree": "is not supported with BA-LoRA yet: use DDP or FSDP.",
}


KERNELS = tuple(key for key, why in _REFUSED.items() if why is _KERNELS)


def active(cfg: Any) -> bool:
    """True if this config trains with the terms: `adapter: ba_lora`, or a block with `apply_to`."""
    block = cfg.get("ba_lora")
    return cfg.get("adapter") == ADAPTER or bool(block and block.get("apply_to"))


def check_command_line(arguments: list[str] | None = None) -> None:
    """Refuses `--ba_lora...` options, which Axolotl's command line drops without a word.

    Raises:
        ValueError: names the option.
    """
    for argument in sys.argv[1:] if arguments is None else arguments:
        if argument.startswith("--") and argument[2:].replace("-", "_").startswith(ADAPTER):
            raise ValueError(
                f"{argument}: Axolotl drops command-line options of a plug-in's block: write it in the YAML."
            )


def check_raw(data: dict[str, Any]) -> None:
    """Checks the whole YAML as it was written.

    Raises:
        ValueError: for the first setting that would be ignored, or would train something else.
    """
    _check_names(data)
    block, adapter = data.get("ba_lora"), data.get("adapter")
    target = block.get("apply_to") if isinstance(block, dict) else None
    if adapter != ADAPTER and block is not None:
        expected = {"lora": "lora", "full": None}.get(str(target), ADAPTER)
        if target is None or (adapter or None) != expected:
            raise ValueError(
                f"adapter: {adapter} beside a ba_lora: block would train without its terms: write adapter: ba_lora, or "
                f"ba_lora.apply_to: {'full' if adapter is None else adapter} to put the terms on it."
            )
    if adapter == ADAPTER and target is not None:
        raise ValueError(f"ba_lora.apply_to: {target} beside adapter: ba_lora contradicts it: remove one of the two.")
    if not active({"adapter": adapter, "ba_lora": block if isinstance(block, dict) else None}):
        return
    for key, why in _REFUSED.items():
        if data.get(key):
            raise ValueError(f"{key}: {data[key]} {why}")
    _check_adapter(data)
    _check_engine(data)


def _check_names(data: dict[str, Any]) -> None:
    for key in data:
        if key == "ba_lora" or not isinstance(key, str):
            continue
        if difflib.get_close_matches(key.lower().replace("-", "_"), [ADAPTER, "balora"], n=1, cutoff=0.8):
            raise ValueError(f"{key}: is not a key Axolotl or BA-LoRA knows: did you mean ba_lora?")
        near = difflib.get_close_matches(key, _OURS, n=1, cutoff=0.85)
        if near:
            raise ValueError(
                f"{key}: {data[key]!r} stands at top level, where it is ignored: write it as ba_lora.{near[0]}."
            )


def _check_adapter(data: dict[str, Any]) -> None:
    if data.get("adapter") != ADAPTER:
        return
    for key in ("lora_r", "lora_alpha"):
        if data.get(key) is None and not data.get("lora_model_dir"):
            raise ValueError(f"{key}: is missing, adapter: ba_lora needs it: write for example {key}: 16.")
    targets = ("lora_target_linear", "lora_target_modules", "lora_target_parameters")
    if not any(data.get(key) for key in targets) and not data.get("lora_model_dir"):
        raise ValueError("lora_target_modules: is missing: write lora_target_linear: true, or a list of module names.")
    start = data.get("peft_init_lora_weights")
    if start not in STARTS:
        raise ValueError(f"peft_init_lora_weights: {start} is not a start of BA-LoRA: write pissa, pissa_fast or true.")
    modules = data.get("lora_target_modules") or []
    for name in [modules] if isinstance(modules, str) else modules:
        if name in ("lm_head", "embed_tokens", "embed_out", "wte"):
            raise ValueError(
                f"lora_target_modules: {name} cannot be adapted (the terms read the head's weight): remove it; "
                "lora_modules_to_save trains such a module whole."
            )


def _check_engine(data: dict[str, Any]) -> None:
    for key in ("context_parallel_size", "tensor_parallel_size"):
        if (data.get(key) or 1) > 1:
            raise ValueError(f"{key}: {data[key]} is not supported with BA-LoRA yet: use DDP or FSDP.")
    fsdp = data.get("fsdp_config") or {}
    if isinstance(fsdp, dict) and (fsdp.get("cpu_ram_efficient_loading") or fsdp.get("fsdp_cpu_ram_efficient_loading")):
        raise ValueError(
            "fsdp_config.cpu_ram_efficient_loading: true leaves most ranks without the weights the start needs: "
            "set it to false."
        )
    attention = data.get("attn_implementation") or ("flash_attention_2" if data.get("flash_attention") else None)
    half = data.get("bf16") or data.get("fp16") or data.get("bfloat16") or data.get("float16")
    if attention and str(attention).startswith("flash_attention") and half in (False, None, "false"):
        raise ValueError(
            f"{'flash_attention: true' if data.get('flash_attention') else f'attn_implementation: {attention}'} needs "
            "half precision: write bf16: true, or attn_implementation: sdpa."
        )
    if (data.get("label_smoothing_factor") or 0) > 0:
        raise ValueError(
            f"label_smoothing_factor: {data['label_smoothing_factor']} does not work with BA-LoRA: remove it."
        )
