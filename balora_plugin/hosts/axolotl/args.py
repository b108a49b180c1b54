"""The `ba_lora:` block of an Axolotl YAML: typed, bounded, described; unknown keys refused."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from ...config import RegularizerConfig
from .checks import check_raw


class BaLoraBlock(BaseModel):
    """RegularizerConfig's fields; everything about the adapter itself is in Axolotl's own `lora_*` keys."""

    preset: Literal["paper", "iclr2026"] = Field(
        default="paper",
        description="Weights and forms of the paper's second arXiv version, or of its ICLR 2026 version.",
    )
    task: Literal["auto", "nlg", "nlu"] = Field(
        default="auto", description="Which family of terms; auto: by the model."
    )
    lambda_consistency: float | None = Field(
        default=None, ge=0.0, allow_inf_nan=False, description="Weight of the distance to the pre-trained model."
    )
    lambda_diversity: float | None = Field(
        default=None, ge=0.0, allow_inf_nan=False, description="Weight of minus the entropy of the predictions."
    )
    lambda_svd: float | None = Field(
        default=None,
        ge=0.0,
        allow_inf_nan=False,
        description="Weight of minus the share of the leading singular values.",
    )
    consistency: Literal["kl", "reverse_kl", "jsd", "mse"] | None = Field(
        default=None, description="Form of the consistency term."
    )
    temperature: float | None = Field(
        default=None, gt=0.0, allow_inf_nan=False, description="Temperature of the KL and JSD forms."
    )
    diversity_top_k: int | None = Field(
        default=None, ge=0, description="Entropy over the K most likely tokens; 0: full vocabulary."
    )
    svd_top_k: int | None = Field(default=None, ge=1, description="How many singular values count as signal.")
    svd_norm: Literal["nuclear", "frobenius", "none"] | None = Field(
        default=None, description="What the sum of the leading singular values is divided by."
    )
    svd_input: Literal["logits", "centered_logits", "features"] | None = Field(
        default=None, description="The matrix whose singular values are taken."
    )
    svd_layout: Literal["rows", "flattened"] | None = Field(
        default=None, description="One row a counted token, or one row a sample."
    )
    schedule: Literal["constant", "iclr2026"] | None = Field(default=None, description="How the weights move.")
    teacher_interval: int = Field(
        default=1, ge=1, description="Teacher on every n-th micro-batch with n times the weight; 1: always, exact."
    )
    teacher_cache: str | None = Field(
        default=None,
        description="Directory that keeps the teacher's hidden states of each document, for later epochs and runs.",
    )
    share_interval: int = Field(
        default=100, ge=0, description="Measure each term's share of the gradient every n steps; 0: never."
    )
    compile: bool = Field(default=False, description="Not available in this version; torch_compile: true is.")
    apply_to: Literal["lora", "full"] | None = Field(
        default=None,
        description="Put the terms on `adapter: lora`, or on full fine-tuning (with teacher_cache, or "
        "lambda_consistency: 0), instead.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"ba_lora: {data!r} must be a block of settings, or absent.")
        for key in data:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(cls.model_fields)}."
                raise ValueError(f"ba_lora.{key}: {data[key]!r} is not a setting: {hint}")
        return data

    @model_validator(mode="after")
    def _resolve(self) -> BaLoraBlock:
        self.regularizers()
        if self.compile:
            raise ValueError("ba_lora.compile: true is not available in this version: use torch_compile: true.")
        return self

    def regularizers(self) -> RegularizerConfig:
        """The settings as the core takes them."""
        return RegularizerConfig.from_dict(self.model_dump(exclude={"compile", "apply_to"}))


class BaLoraArgs(BaseModel):
    """What the plugin adds to Axolotl's config: the block, and the checks that need the whole YAML."""

    ba_lora: BaLoraBlock | None = Field(
        default=None, description="Settings of BA-LoRA's regularisers, for `adapter: ba_lora`."
    )

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        if isinstance(data, dict):
            check_raw(data)
        return data
