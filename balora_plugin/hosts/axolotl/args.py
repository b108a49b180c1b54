"""The `ba_lora:` block of an Axolotl YAML: typed, bounded, described; unknown keys refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from ...config import RegularizerConfig
from .checks import check_raw, nearest_field

_OF_THE_HOST = {"compile", "start_from", "apply_to", "text_columns", "label_column"}


def _top_level(key: str) -> str:
    return key if key.startswith(("lora_", "peft_")) else f"lora_{key}"


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
    diversity_input: Literal["logits", "features"] | None = Field(
        default=None, description="Classification: the matrix whose covariance is taken."
    )
    svd_layout: Literal["rows", "flattened"] | None = Field(
        default=None, description="One row a counted token, or one row a sample."
    )
    svd_max_rows: int = Field(
        default=1024, ge=0, description="Spectrum over at most so many counted tokens of a micro-batch; 0: all."
    )
    schedule: Literal["constant", "iclr2026"] | None = Field(default=None, description="How the weights move.")
    teacher_interval: int = Field(
        default=1, ge=1, description="Teacher on every n-th micro-batch with n times the weight; 1: always, exact."
    )
    teacher_cache: str | None = Field(
        default=None,
        description="Directory that keeps the teacher's outputs for each document, for later epochs and runs.",
    )
    teacher_cache_top_k: int | None = Field(
        default=None,
        ge=0,
        description="What it keeps of a token; 0: the hidden state, exact; n: the n largest log-probabilities; absent: "
        "by size.",
    )
    gather_batch_statistics: bool = Field(
        default=False, description="Classification: covariance and spectrum over the samples of all ranks together."
    )
    head_warmup_steps: int = Field(
        default=0, ge=0, description="Classification: the first n steps train the head alone; the teacher then has it."
    )
    share_interval: int = Field(
        default=100, ge=0, description="Measure each term's share of the gradient every n steps; 0: never."
    )
    compile: bool | Literal["layers"] = Field(
        default=False,
        description="Compile teacher, student and terms with the backend ba_lora; layers: each kind of layer once.",
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="With load_in_4bit or load_in_8bit: the full-precision model (directory, .safetensors file or hub "
        "id) whose weights give A0 and B0, read one at a time; null: the dequantised weights.",
    )
    apply_to: Literal["lora", "full"] | None = Field(
        default=None,
        description="Put the terms on `adapter: lora`, or on full fine-tuning (with teacher_cache, or "
        "lambda_consistency: 0), instead.",
    )

    text_columns: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=2,
        description="Classification: the column of the text, or the two of a pair; null: found by their usual names.",
    )
    label_column: str | None = Field(
        default=None, min_length=1, description="Classification: the column of the label; null: label or labels."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"ba_lora: {data!r} must be a block of settings, or absent.")
        for key, value in data.items():
            if isinstance(value, bool) and key not in (
                "compile",
                "gather_batch_statistics",
            ):  # pydantic would make a weight of 1.0 of it
                raise ValueError(f"ba_lora.{key}: {str(value).lower()} is no value for it: write a number or a name.")
            if key == "compile" and value not in (True, False, "layers"):
                raise ValueError(f"ba_lora.compile: {value!r} is no way to compile: write true, false or layers.")
            if key not in cls.model_fields:
                near = nearest_field(str(key))
                if str(key) in ("r", "alpha", "dropout") or str(key).startswith(("lora_", "peft_")):
                    hint = f"the adapter's own keys stand at top level: write {_top_level(str(key))} there."
                elif near:
                    hint = f"did you mean {near}?"
                else:
                    hint = "axolotl ba-lora schema prints what there is."
                raise ValueError(f"ba_lora.{key}: {data[key]!r} is not a setting: {hint}")
        return data

    @model_validator(mode="after")
    def _resolve(self) -> BaLoraBlock:
        self.regularizers()
        if self.compile and self.apply_to is not None:
            raise ValueError(
                f"ba_lora.compile: {str(self.compile).lower()} does not work with apply_to: {self.apply_to}: remove "
                "one of the two."
            )
        return self

    def regularizers(self) -> RegularizerConfig:
        """The settings as the core takes them."""
        return RegularizerConfig.from_dict(self.model_dump(exclude=_OF_THE_HOST))


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
