"""Settings that would train something else than the YAML says, or that no part here can train: key, why, remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ...findings import Finding


class Refusal(NamedTuple):
    """Why a key is refused, what to write instead, and whether that trains something else."""

    why: str
    remedy: str
    changes_training: bool


_LOGITS = Refusal("replaces the loss or the forward that computes the terms", "remove it", True)
_OTHER_LOSS = Refusal("trains with another loss: BA-LoRA is for supervised fine-tuning", "remove it", True)
_BASE = Refusal("trains or changes base parameters that the teacher shares", "remove it", True)
_SPLIT = Refusal("is not supported with BA-LoRA yet", "use DDP or DeepSpeed", False)
_STORED = Refusal(
    "is not supported with adapter: ba_lora", "use the full-precision base model (with load_in_4bit: true)", True
)
# a truthy value is refused
REFUSED: dict[str, Refusal] = {
    "liger_use_token_scaling": Refusal("weighs the loss by the model's own probabilities", "remove it", True),
    "use_eaft": _LOGITS,
    "kd_trainer": _LOGITS,
    "orpo_alpha": _LOGITS,
    "gptq": _STORED,
    "rl": _OTHER_LOSS,
    "reward_model": _OTHER_LOSS,
    "process_reward_model": _OTHER_LOSS,
    "trainer_cls": Refusal("replaces the trainer that computes the terms", "remove it", True),
    "relora": Refusal("restarts the adapter into the base, which BA-LoRA never changes", "remove it", True),
    "peft_use_dora": Refusal("is another adapter", "remove it, or write ba_lora.method: dora", True),
    "peft_ensure_weight_tying": Refusal("ties what the adapter's file keeps apart", "remove it", True),
    "use_onebitllms": Refusal("replaces the linear layers under the adapter", "remove it", True),
    "qat": Refusal("quantises the base, and with it the teacher, in mid-training", "remove it", True),
    "lisa_n_layers": _BASE,
    "peft_layer_replication": _BASE,
    "peft_trainable_token_indices": _BASE,
    "unfrozen_parameters": _BASE,
}
_STARTS = "write peft_init_lora_weights: pissa or true (over a quantised base too: load_in_4bit: true)"
# sizes of which 1 is none
SPLITS = ("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size", "expert_parallel_size")
# Axolotl's plug-ins that bring a trainer of their own; one of another origin is found before the model loads
TRAINERS = ("DiffusionPlugin", "HatcheryPlugin")


def refused(values: Any) -> Iterator[Finding]:
    """Finds what is refused by its key alone, in a YAML as it was written or in the final config."""
    for key, refusal in REFUSED.items():
        if values.get(key) and not (key == "peft_use_dora" and values.get("adapter") == "lora"):
            yield Finding(key, _plain(values.get(key)), *refusal)
    for key in SPLITS:
        if str(values.get(key) or 1) != "1":
            yield Finding(key, values.get(key), *_SPLIT)
    for name in values.get("plugins") or []:
        if str(name).rpartition(".")[2] in TRAINERS:
            yield Finding(f"plugins[{name}]", None, *_TRAINER)
        elif str(name).endswith("SpectrumPlugin"):  # behind ours in the list it writes unfrozen_parameters after this
            yield Finding(f"plugins[{name}]", None, *_BASE)
    yield from _read_as(values)
    yield from peft_block(values)


_TRAINER = Refusal("brings a trainer of its own, in place of the one that computes the terms", "remove it", True)


def other_trainers(cfg: Any, ours: type) -> Iterator[Finding]:
    """Finds other plug-ins that bring a trainer, of which Axolotl would take one without a word of the other."""
    from axolotl.integrations.base import PluginManager

    for name, plugin in PluginManager.get_instance().plugins.items():
        if not isinstance(plugin, ours) and plugin.get_trainer_cls(cfg) is not None:
            yield Finding(f"plugins[{name}]", None, *_TRAINER)


def _read_as(values: Any) -> Iterator[Finding]:
    """Base models that Axolotl is told to read in another way: only one that is full precision when it is there."""
    how = values.get("model_quantization_config")
    settings = values.get("model_quantization_config_kwargs") or {}
    if how == "Mxfp4Config" and not settings.get("dequantize"):
        remedy = (
            "write model_quantization_config_kwargs: {dequantize: true}, which trains over the same weights as floats"
        )
        yield Finding(
            "model_quantization_config", how, "leaves the weights packed, which no adapter stands on", remedy, False
        )
    elif how and how != "Mxfp4Config":
        yield Finding("model_quantization_config", how, *_STORED)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def peft_block(data: Any) -> Iterator[Finding]:
    """Finds what stands under `peft:`, of which nothing would reach the adapter."""
    block = data.get("peft")
    for key, value in block.items() if isinstance(block, Mapping) else ():
        value = dict(value) if isinstance(value, Mapping) else value
        if key == "loftq_config" and value:
            yield Finding(
                "peft.loftq_config", value, "is a start that BA-LoRA does not make", f"remove it, {_STARTS}", True
            )
        elif value not in (None, False, {}, []):
            remedy = "write the adapter's own key at top level (lora_..., peft_...), or remove it"
            yield Finding(f"peft.{key}", _quoted(value), "is not read by Axolotl", remedy)


def _quoted(value: Any) -> Any:
    return repr(value) if isinstance(value, str) else value
