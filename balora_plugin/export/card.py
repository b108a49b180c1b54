"""The model card of an exported adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from ..adapter.saved.card import CITATION, TAG, VLLM_DEFAULT_RANK, loader_of, loading_snippet, quantisation_in_words

if TYPE_CHECKING:
    from .lora_file import Adapter
    from .prediction import Lost


def exported(
    adapter: Adapter,
    lost: Lost,
    *,
    merged_into: str | None = None,
    quantization: dict[str, Any] | None = None,
    trained: str | None = None,
) -> str:
    """Returns the whole card of an exported adapter or merged model.

    `quantization`: of the base that was trained on; of a merged model, if its weights are those dequantised. `trained`:
    the class of the base, as ba_lora.json has it.
    """
    config = adapter.config
    base = merged_into or config.base_model_name_or_path or "BASE"
    data = ModelCardData(
        base_model=base if merged_into or config.base_model_name_or_path else None,
        library_name="transformers" if merged_into else "peft",
        pipeline_tag="text-generation" if str(config.task_type).endswith("CAUSAL_LM") else None,
        tags=[TAG] if merged_into else [TAG, "lora"],
    )
    worst = "".join(f"| {name} | {error:.2g} |\n" for name, error in lost.errors.worst(5))
    if merged_into:
        how = f", dequantised from {quantisation_in_words(quantization)}," if quantization else ""
        what = f"The base `{base}`{how} with a LoRA of rank {adapter.rank} merged into its weights, then rounded."
        loader = loader_of(trained)
        loading = f'```python\nfrom transformers import {loader}\n\nmodel = {loader}.from_pretrained(".")\n```'
    else:
        what = (
            f"A plain LoRA of rank {config.r} for `{base}`, without side files. Servers need `max_lora_rank` >= "
            f"{config.r} (vLLM's default is {VLLM_DEFAULT_RANK})."
        )
        what += " It holds whole embeddings, which servers do not take: merge it for them." if adapter.originals else ""
        loading = "\n".join(loading_snippet(base, ".", quantization=quantization, trained=trained))
    kl = "" if lost.loss is None else f"KL to the adapter it was made from, in nats a token: {lost.loss}.\n\n"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Exported by balora\n\n{what}\n\n{loading}\n\n{kl}Relative error of the "
        f"update against the adapter it was made from (Frobenius norm): {lost.errors.total:.2g} in total. The layers "
        f"that lose most:\n\n| layer | error |\n|---|---|\n{worst}\n## Cite the method\n\n{CITATION}\n"
    )
