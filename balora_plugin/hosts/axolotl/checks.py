"""What would train something else than the YAML says, refused before the model loads: key, value, remedy."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch

from ...config import RegularizerConfig
from ...pretrained.attention import FLAGS, attention_of, check_flash, is_flash
from ...settings import settings_of
from ...training.checks.teacher import MUTATING_STARTS
from ...training.compiling import BACKEND, LAYERS
from ...training.task_form import task_form
from .asked import check_expert_kernel, check_peft_block
from .classification import check as check_classification
from .classification import is_classification

ADAPTER = "ba_lora"


class SettingError(click.ClickException, ValueError):
    """A wrong setting: a ValueError for code, one line without a traceback on Axolotl's command line."""


@contextmanager
def as_setting_errors() -> Iterator[None]:
    """A ValueError raised inside, the core's own included, leaves as a SettingError."""
    try:
        yield
    except SettingError:
        raise
    except ValueError as error:
        raise SettingError(str(error)) from None


def one_line_errors() -> None:
    """Lets an uncaught SettingError be one line where no click is: accelerate and torchrun run Axolotl's modules."""
    if sys.excepthook is sys.__excepthook__ and click.get_current_context(silent=True) is None:
        sys.excepthook = _one_line_for_settings


def _one_line_for_settings(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not issubclass(kind, SettingError):
        sys.__excepthook__(kind, error, trace)
    elif os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"Error: {error}", file=sys.stderr)


_FLOATS = ("float32", "bfloat16", "float16")
_BNB_OPTIONS: dict[str, tuple[Any, ...] | None] = {  # of a BitsAndBytesConfig -> what it may be, None: anything
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_compute_dtype": _FLOATS,
    "bnb_4bit_quant_storage": ("uint8", "int8", *_FLOATS),
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": None,
    "llm_int8_enable_fp32_cpu_offload": (True, False),
    "llm_int8_has_fp16_weight": (True, False),
}
STARTS = ("pissa", "pissa_fast", True, None)

# of the block, beside the fields of RegularizerConfig
HOST_KEYS = ("compile", "start_from", "apply_to", "loss_type", "text_columns", "label_column")
# names so much ours that at top level they can only be a block forgotten (Axolotl ignores unknown keys)
_OURS = [
    name
    for name in settings_of(RegularizerConfig)
    if name.startswith(("lambda_", "svd_", "teacher_", "diversity_", "share_")) or name == "consistency"
]
# the others, refused there where ba_lora is in use
_BLOCK_ONLY = [*(name for name in settings_of(RegularizerConfig) if name not in _OURS), *HOST_KEYS]

_KERNELS = "reads lora_A and lora_B itself and would leave out the frozen factors: set it to false."
_PLUGIN_KERNELS = "reads lora_A and lora_B itself, as lora_mlp_kernel does: remove it."
_LOGITS = "replaces the loss or the forward that computes the terms: remove it."
_OTHER_LOSS = "trains with another loss: BA-LoRA is for supervised fine-tuning; remove it."
_BASE = "trains or changes base parameters that the teacher shares: remove it."
_SHARDED = "is saved by Axolotl past the adapter's own writer, which would lose half of it: use DDP or DeepSpeed."
# key -> why; a truthy value is refused
_REFUSED: dict[str, str] = {
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "lora_embedding_kernel": _KERNELS,
    "dsv4_fp8_lora_kernel": _PLUGIN_KERNELS,
    "dsv4_shared_mlp_lora_kernel": _PLUGIN_KERNELS,
    "liger_fused_linear_cross_entropy": _LOGITS,
    "liger_cross_entropy": _LOGITS,
    "cut_cross_entropy": _LOGITS,
    "chunked_cross_entropy": _LOGITS,
    "use_eaft": _LOGITS,
    "kd_trainer": _LOGITS,
    "orpo_alpha": _LOGITS,
    "gptq": "is not supported with adapter: ba_lora: use the full-precision base model (with load_in_4bit: true).",
    "quantize_moe_experts": "is not supported with adapter: ba_lora: remove it (the experts stay as they are stored).",
    "rl": _OTHER_LOSS,
    "reward_model": _OTHER_LOSS,
    "process_reward_model": _OTHER_LOSS,
    "trainer_cls": "replaces the trainer that computes the terms: remove it.",
    "fsdp": _SHARDED,
    "fsdp_config": _SHARDED,
    "fsdp_version": _SHARDED,
    "relora": "restarts the adapter into the base, which BA-LoRA never changes: remove it.",
    "peft_use_dora": "is another adapter: remove it.",
    "peft_ensure_weight_tying": "ties what the adapter's file keeps apart: remove it.",
    "use_onebitllms": "replaces the linear layers under the adapter: remove it.",
    "flash_attn_fuse_mlp": "replaces the linear layers under the adapter: remove it.",
    "qat": "quantises the base, and with it the teacher, in mid-training: remove it.",
    "model_quantization_config": "is not supported with adapter: ba_lora: use the full-precision base model.",
    "lisa_n_layers": _BASE,
    "peft_layer_replication": _BASE,
    "peft_trainable_token_indices": _BASE,
    "unfrozen_parameters": _BASE,
    "sequence_parallel_degree": "is not supported with BA-LoRA yet: use DDP or DeepSpeed.",
}
LOAD_IN = {4: "load_in_4bit", 8: "load_in_8bit"}
KERNELS = tuple(key for key, why in _REFUSED.items() if why is _KERNELS)
_TERMS = {  # the paper's numbers and letters
    "lambda_consistency": ("lambda1", "lambda_1", "lambda_cr", "l1", "cr"),
    "lambda_diversity": ("lambda2", "lambda_2", "lambda_dr", "lambda_entropy", "l2", "dr"),
    "lambda_svd": ("lambda3", "lambda_3", "lambda_svdr", "l3", "svdr"),
}


def nearest_field(key: str) -> str | None:
    """The block's field that a misspelt one most likely means."""
    for name, others in _TERMS.items():
        if key.lower() in others:
            return name
    near = difflib.get_close_matches(key, [*settings_of(RegularizerConfig), *HOST_KEYS], n=1)
    if near and key.startswith("lambda") and difflib.SequenceMatcher(None, key, near[0]).ratio() < 0.8:
        return "lambda_consistency, lambda_diversity or lambda_svd"
    return near[0] if near else None


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
            also = {"lora": ", or ba_lora.apply_to: lora to put them on it", None: ", or ba_lora.apply_to: full"}
            raise ValueError(
                f"adapter: {adapter} beside a ba_lora: block would train without its terms: write adapter: ba_lora"
                f"{also.get(adapter, '')} (of several adapter: lines in a YAML the last counts)."
            )
    if adapter == ADAPTER and target is not None:
        raise ValueError(f"ba_lora.apply_to: {target} beside adapter: ba_lora contradicts it: remove one of the two.")
    if not active({"adapter": adapter, "ba_lora": block if isinstance(block, dict) else None}):
        return
    check_refused(data)
    check_classification(data, block if isinstance(block, dict) else {})
    _check_adapter(data)
    _check_quantised(data, block if isinstance(block, dict) else {})
    _check_terms(data, block if isinstance(block, dict) else {})
    _check_engine(data)


def check_refused(data: Any) -> None:
    """Settings that would train something else, in the YAML or (defaults of other plug-ins) in the final config."""
    for key, why in _REFUSED.items():
        if data.get(key):
            raise ValueError(f"{key}: {data.get(key)} {why}")
    check_peft_block(data)
    check_expert_kernel(data, data.get("lora_target_parameters"))
    for name in data.get("plugins") or []:
        if str(name).rpartition(".")[2] == "CutCrossEntropyPlugin" and data.get("cut_cross_entropy", True):
            raise ValueError(f"plugins: {name} turns cut_cross_entropy on, which {_LOGITS}")


def _check_terms(data: dict[str, Any], block: dict[str, Any]) -> None:
    """What the core refuses once the model is there, said before and in the YAML's words."""
    task_form(data.get("label_smoothing_factor"), block.get("loss_type"))
    target = block.get("apply_to")
    cached = block.get("teacher_cache") and not is_classification(data)
    if target == "full" and block.get("lambda_consistency") != 0 and not cached:
        remedy = "ba_lora.teacher_cache: <a directory> (filled before the first step), or 0."
        raise ValueError(
            f"ba_lora.lambda_consistency: {block.get('lambda_consistency', 'the preset')} has no teacher in full "
            f"fine-tuning, where no adapter can be switched off: write {'0.' if is_classification(data) else remedy}"
        )
    start = data.get("peft_init_lora_weights")
    if target == "lora" and isinstance(start, str) and start.lower().startswith(MUTATING_STARTS):
        raise ValueError(
            f"peft_init_lora_weights: {start} with ba_lora.apply_to: lora rewrites the base, so that the teacher would "
            "be its residual: write adapter: ba_lora (the same start, base untouched)."
        )


def _check_names(data: dict[str, Any]) -> None:
    adapter = str(data.get("adapter") or "")
    for key in _BLOCK_ONLY:
        if key in data and (adapter == ADAPTER or "ba_lora" in data):
            raise ValueError(f"{key}: {data[key]!r} stands at top level, where it is ignored: write ba_lora.{key}.")
    if adapter != ADAPTER and adapter.lower().replace("-", "_") in (ADAPTER, "balora"):
        raise ValueError(f"adapter: {adapter} is not an adapter Axolotl or BA-LoRA knows: did you mean ba_lora?")
    for key in data:
        if key == "ba_lora" or not isinstance(key, str):
            continue
        if difflib.get_close_matches(key.lower().replace("-", "_"), [ADAPTER, "balora"], n=1, cutoff=0.8):
            raise ValueError(f"{key}: is not a key Axolotl or BA-LoRA knows: did you mean ba_lora?")
        near = difflib.get_close_matches(key, _OURS, n=1, cutoff=0.85)
        if near or key.startswith("lambda"):
            raise ValueError(
                f"{key}: {data[key]!r} stands at top level, where it is ignored: write it as ba_lora."
                f"{near[0] if near else nearest_field(key)}."
            )


def _check_adapter(data: dict[str, Any]) -> None:
    if data.get("adapter") != ADAPTER:
        return
    if data.get("inference") and not data.get("lora_model_dir") and not data.get("merge_lora"):
        raise ValueError(
            "lora_model_dir: is missing, so inference would show the base model: pass "
            f"--lora-model-dir={data.get('output_dir') or '<output_dir>'}, or write it in the YAML."
        )
    for key in ("lora_r", "lora_alpha"):
        if data.get(key) is None and not data.get("lora_model_dir"):
            raise ValueError(f"{key}: is missing, adapter: ba_lora needs it: write for example {key}: 16.")
        value = data.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{key}: {value!r} must be a whole number of at least 1, for example 16.")
    targets = ("lora_target_linear", "lora_target_modules", "lora_target_parameters")
    if not any(data.get(key) for key in targets) and not data.get("lora_model_dir") and not is_classification(data):
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


def _check_quantised(data: dict[str, Any], block: dict[str, Any]) -> None:
    """4-bit and 8-bit loading, and what says how or needs it."""
    on = [key for key in LOAD_IN.values() if data.get(key)]
    if len(on) > 1:
        raise ValueError("load_in_4bit: true beside load_in_8bit: true contradict each other: remove one of the two.")
    if on and block.get("apply_to"):
        raise ValueError(
            f"{on[0]}: true with ba_lora.apply_to: {block['apply_to']} is not supported: write adapter: ba_lora, with "
            "peft_init_lora_weights: true for a plain LoRA."
        )
    if on and data.get("fp8"):
        raise ValueError(f"fp8: {data['fp8']} beside {on[0]}: true would quantise the model twice: remove one of them.")
    given = (data.get("overrides_of_model_kwargs") or {}).get("quantization_config")
    if given and given not in [{key: True} for key in LOAD_IN.values()]:  # what the plug-in itself writes
        raise ValueError(
            "overrides_of_model_kwargs.quantization_config: would leave out Axolotl's preparation of quantised models: "
            "write load_in_4bit: true with bnb_config_kwargs, or load_in_8bit: true."
        )
    # merge-lora switches both keys off, and a written `false` (--no-load-in-4bit) leaves the rest of the YAML idle
    idle = data.get("merge_lora") or (not on and any(data.get(key) is False for key in LOAD_IN.values()))
    options = dict(data.get("bnb_config_kwargs") or {})
    if options and not data.get("load_in_4bit") and not idle:
        raise ValueError(f"bnb_config_kwargs: {options} needs load_in_4bit: true, which alone reads it: remove it.")
    for key, value in options.items():
        if key not in _BNB_OPTIONS:
            near = difflib.get_close_matches(str(key), _BNB_OPTIONS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_BNB_OPTIONS)}."
            raise ValueError(f"bnb_config_kwargs.{key}: {value!r} is no option of bitsandbytes: {hint}")
        allowed = _BNB_OPTIONS[key]
        if allowed is not None and value not in allowed:
            raise ValueError(
                f"bnb_config_kwargs.{key}: {value!r} is not known: write one of {', '.join(map(str, allowed))}."
            )
    _check_start_from(data, block.get("start_from"), bool(on or idle))


def _check_start_from(data: dict[str, Any], start: Any, quantised: bool) -> None:
    if start is None:
        return
    if data.get("peft_init_lora_weights") is True:
        raise ValueError(
            f"ba_lora.start_from: {start!r} with peft_init_lora_weights: true, which has no A0 and B0: remove one of "
            "the two."
        )
    if not quantised:
        raise ValueError(
            f"ba_lora.start_from: {start!r} is for a quantised base: write load_in_4bit: true, or remove it (an "
            "unquantised base starts from its own weights)."
        )
    if str(start).startswith((".", "/", "~")) and not os.path.exists(start):
        raise ValueError(
            f"ba_lora.start_from: {start!r} does not exist: write a directory, a .safetensors file or a hub id."
        )


def _check_engine(data: dict[str, Any]) -> None:
    block = data.get("ba_lora")
    ours = data.get("torch_compile_backend") == BACKEND  # the same, said twice
    if isinstance(block, dict) and block.get("compile") and data.get("torch_compile") and not ours:
        raise ValueError(
            f"torch_compile: {data['torch_compile']} beside ba_lora.compile: {str(block['compile']).lower()} would "
            f"compile the model twice: remove one of the two, or write torch_compile_backend: {BACKEND}."
        )
    if compiles_whole(data) and data.get("gradient_checkpointing") and reentrant_of(data):
        by_block = isinstance(block, dict) and block.get("compile")
        said = "ba_lora.compile: true" if by_block else f"torch_compile_backend: {BACKEND}"
        raise ValueError(
            f"gradient_checkpointing_kwargs: {dict(data['gradient_checkpointing_kwargs'])} with {said}, whose graphs "
            "cannot hold reentrant checkpointing: write use_reentrant: false (or leave the line out), or "
            "ba_lora.compile: layers."
        )
    for key in ("context_parallel_size", "tensor_parallel_size", "expert_parallel_size"):
        if str(data.get(key) or 1) != "1":
            raise ValueError(f"{key}: {data[key]} is not supported with BA-LoRA yet: use DDP or DeepSpeed.")
    for flag in FLAGS if data.get("attn_implementation") else ():
        if data.get(flag):
            raise ValueError(
                f"{flag}: {str(data[flag]).lower()} beside attn_implementation: {data['attn_implementation']}: Axolotl "
                f"takes one line alone: remove {flag}."
            )
    half = data.get("bf16", "auto") or data.get("fp16") or data.get("bfloat16") or data.get("float16")  # as Axolotl's
    if is_flash(attention_of(data)[2]) and half in (False, None, "false"):
        raise ValueError(f"{attention_setting(data)} {_HALF}")


def compiles_whole(data: Any) -> bool:
    """Whether a YAML asks for the backend's graphs of the whole model, in the block or by Axolotl's own keys."""
    block = data.get("ba_lora")
    how = block.get("compile") if isinstance(block, dict) else None
    named = bool(data.get("torch_compile")) and data.get("torch_compile_backend") == BACKEND
    return how is True or (named and how != LAYERS)


def reentrant_of(data: Any) -> bool:
    """Whether the YAML says use_reentrant: true."""
    return bool((data.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"))


_HALF = "needs half precision: write bf16: true, or attn_implementation: sdpa."


def attention_setting(data: Any) -> str:
    """The line of a YAML, written or validated, that names the attention implementation; empty without one."""
    key, value, _ = attention_of(data)
    return f"{key}: {str(value).lower() if value is True else value}" if key else ""


def check_attention_here(cfg: Any, setting: str) -> None:
    """The final config, before the model loads: flash attention that this machine or the precision cannot run.

    Raises:
        ValueError: `setting` (the line of the YAML), what is missing and what to write.
    """
    name = attention_of(cfg)[2]
    if not is_flash(name):
        return
    check_flash(name, setting, "attn_implementation: sdpa")
    if cfg.get("torch_dtype") == torch.float32:
        raise ValueError(f"{setting} {_HALF}")
