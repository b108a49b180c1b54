"""The model card of an exported adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from ..adapter.saved.card import VLLM_DEFAULT_RANK, loading_snippet

if TYPE_CHECKING:
    from .lora_file import Adapter, Errors


def exported(adapter: Adapter, errors: Errors, *, merged_into: str | None = None) -> str:
    """Returns the whole card of an exported adapter or merged model."""
    config = adapter.config
    base = merged_into or config.base_model_name_or_path or "BASE"
    data = ModelCardData(
        base_model=base if merged_into or config.base_model_name_or_path else None,
        library_name="transformers" if merged_into else "peft",
        pipeline_tag="text-generation" if str(config.task_type).endswith("CAUSAL_LM") else None,
        tags=["ba-lora"] if merged_into else ["ba-lora", "lora"],
    )
    worst = "".join(f"| {name} | {error:.2g} |\n" for name, error in errors.worst(5))
    if merged_into:
        what = f"The base `{base}` with a LoRA of rank {adapter.rank} merged into its weights in float32, then rounded."
        loading = f"```python\nfrom transformers import AutoModelForCausalLM\n\n{_LOAD.format('.')}\n```"
    else:
        what = (
            f"A plain LoRA of rank {config.r} for `{base}`, without side files. Servers need `max_lora_rank` >= "
            f"{config.r} (vLLM's default is {VLLM_DEFAULT_RANK})."
        )
        loading = "\n".join(loading_snippet(base, "."))
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Exported by balora\n\n{what}\n\n{loading}\n\nRelative error of the update "
        f"against the adapter it was made from (Frobenius norm): {errors.total:.2g} in total. The layers that lose "
        f"most:\n\n| layer | error |\n|---|---|\n{worst}"
    )


_LOAD = 'model = AutoModelForCausalLM.from_pretrained("{}")'
