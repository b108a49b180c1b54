"""What the plug-in adds to Axolotl's own config: the `ba_lora:` block, and the checks of the whole YAML."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, model_validator

from . import experts
from .block import BaLoraBlock
from .checks import check_raw
from .method import spelled_out


class BaLoraArgs(BaseModel):
    """What the plugin adds to Axolotl's config: the block, and the checks that need the whole YAML."""

    ba_lora: BaLoraBlock | None = Field(
        default=None, description="Settings of BA-LoRA's regularisers, for `adapter: ba_lora`."
    )
    label_smoothing_factor: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="With BA-LoRA's terms: the part of each target that goes to the whole vocabulary, as in "
        "transformers' TrainingArguments (Axolotl itself does not read it).",
    )
    lora_exclude_modules: str | list[str] | None = Field(
        default=None,
        description="Names, or a regular expression of whole names, of layers that the adapter leaves out (Axolotl "
        "reads this key, but its own schema drops it).",
    )

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = spelled_out(data)
            check_raw(data)
        return data

    @model_validator(mode="wrap")
    @classmethod
    def _quantised_experts(cls, data: Any, validate: Any) -> Any:
        return experts.validated(data, validate)
